"""The outcome of a comparison: a table, the curves, and a JSON file with everything."""

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.training.loop import Run
from benchmarks.training.search import Search

_PACKAGES = ("tekfac_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


class Result(NamedTuple):
    """An optimizer's runs, one for each seed."""

    optimizer: str
    learning_rate: float
    search: Search | None
    compile_seconds: float
    runs: list[Run]


# --- the table -----------------------------------------------------------------------------------


def show_table(console: Console, results: Sequence[Result], target: float) -> None:
    """Prints the final comparison: means over the seeds, ± their standard deviation."""
    header = (
        "", "learning\nrate", "train\nloss", "test\naccuracy %", f"epochs to\n{target:g} %",
        "seconds", "median\nms/step", "mean\nms/step", "compile\ns",
    )  # fmt: skip
    rows = [_row(result, target / 100) for result in results]
    if console.is_terminal:
        # Narrow enough for 80 columns.
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        for i, title in enumerate(header):
            table.add_column(title, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        print(_plain_table([[title.replace("\n", " ") for title in header], *rows]))


def _plain_table(rows: list[list[str]]) -> str:
    """The first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _row(result: Result, accuracy: float) -> list[str]:
    runs = result.runs
    reached = [run.epochs_to(accuracy) for run in runs]
    return [
        result.optimizer,
        f"{result.learning_rate:g}",
        mean_and_spread([run.train_loss for run in runs], "{:.1e}", spread=False),
        mean_and_spread([100 * _final_accuracy(run) for run in runs], "{:.1f}"),
        mean_and_spread([math.nan if epochs is None else epochs for epochs in reached], "{:.1f}"),
        mean_and_spread([sum(run.step_seconds) for run in runs], "{:.2f}", spread=False),
        f"{statistics.median(run.median_step_ms for run in runs):.2f}",
        f"{statistics.fmean(run.mean_step_ms for run in runs):.2f}",
        f"{result.compile_seconds:.1f}",
    ]


def _final_accuracy(run: Run) -> float:
    """The last epoch's test accuracy; NaN if the run diverged or has none."""
    if run.diverged or run.epochs[-1].test_accuracy is None:
        return math.nan
    return run.epochs[-1].test_accuracy


def mean_and_spread(values: Sequence[float], form: str, *, spread: bool = True) -> str:
    """Mean ± standard deviation; if some seeds have no value, how many have one."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    if len(finite) < len(values):
        return f"in {len(finite)} of {len(values)}"
    mean = form.format(statistics.fmean(values))
    if len(values) == 1 or not spread:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


# --- the curves ----------------------------------------------------------------------------------


def save_curves(path: Path, results: Sequence[Result], title: str) -> None:
    """Draws loss and accuracy against epochs and seconds: mean and range over the seeds."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    colors = matplotlib.colormaps["tab10" if len(results) <= 10 else "tab20"]
    quantities: list[tuple[str, Callable[[Any], float]]] = [
        ("training loss", lambda epoch: epoch.train_loss),
        ("test accuracy in %", lambda epoch: 100 * epoch.test_accuracy),
    ]
    for row, (label, quantity) in zip(axes, quantities, strict=True):
        for axis, abscissa in zip(row, ("epoch", "seconds"), strict=True):
            axis.set_prop_cycle(color=[colors(k) for k in range(colors.N)])
            for result in results:
                _draw(axis, result, abscissa, quantity)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(label)
    axes[0, 0].set_yscale("log")
    axes[1, 0].set_xlabel("epoch")
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 1].set_xlabel("seconds of training, compilation excluded")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _draw(axis: Axes, result: Result, abscissa: str, quantity: Callable[[Any], float]) -> None:
    runs = [run for run in result.runs if not run.diverged]
    if not runs:
        axis.plot([], [], label=f"{result.optimizer} (diverged)")
        return
    x = np.mean([[getattr(e, abscissa) for e in run.epochs] for run in runs], axis=0)
    y = np.array([[quantity(e) for e in run.epochs] for run in runs])
    (line,) = axis.plot(x, y.mean(axis=0), label=f"{result.optimizer}, {result.learning_rate:g}")
    if len(runs) > 1:
        axis.fill_between(
            x, y.min(axis=0), y.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0
        )


# --- the file ------------------------------------------------------------------------------------


def save_json(path: Path, results: Sequence[Result], settings: dict[str, Any]) -> None:
    """Writes settings, versions, hardware and every record."""
    content = {
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        "hardware": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpu_count": os.cpu_count(),
            "devices": [device.device_kind for device in jax.devices()],
        },
        "results": [_as_dict(result) for result in results],
    }
    path.write_text(json.dumps(as_plain_json(content), indent=1, allow_nan=False) + "\n")


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        "optimizer": result.optimizer,
        "learning_rate": result.learning_rate,
        "search": result.search and _search_as_dict(result.search),
        "compile_seconds": result.compile_seconds,
        "runs": [
            {
                "seed": run.seed,
                "diverged": run.diverged,
                "train_loss": run.train_loss,
                "median_step_ms": run.median_step_ms,
                "mean_step_ms": run.mean_step_ms,
                "epochs": [epoch._asdict() for epoch in run.epochs],
            }
            for run in result.runs
        ],
    }


def _search_as_dict(search: Search) -> dict[str, Any]:
    trials = [{"learning_rate": rate, "train_loss": x} for rate, x in search.losses.items()]
    return {"trials": trials, "best": search.best, "best_at_edge": search.at_edge}


def as_plain_json(value: Any) -> Any:
    """What JSON can hold: null for a number that is not finite, a string for a path."""
    if isinstance(value, dict):
        return {key: as_plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
