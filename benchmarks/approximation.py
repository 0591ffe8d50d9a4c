"""How near each approximation is to the Fisher block: ``python -m benchmarks.approximation``.

A network is trained. At several points of the training, the relative Frobenius error ‖F − F̂‖ / ‖F‖
of KFAC, EKFAC, TKFAC and TEKFAC is measured for each Dense and conv layer. F is the exact block of
the empirical Fisher over some training examples, from the gradients of single examples in float64.
F̂ is what the library computes from the same examples. The network is in evaluation mode, so that
with BatchNorm, too, each example has its own loss. The error of the nearest Kronecker product is a
floor for KFAC and TKFAC, which are such products. EKFAC and TEKFAC are not, and may lie below it.
Theorem 3.1, TEKFAC ≤ TKFAC and EKFAC ≤ KFAC, is checked everywhere. Embeddings, stacked layers and
grouped convolutions are left out.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import tekfac_jax as tekfac
from benchmarks.data.sets import DATASETS, load_dataset
from benchmarks.errors import DataError, UsageError, check_choice
from benchmarks.fisher.errors import (
    FLOOR,
    METHODS,
    USUAL,
    Point,
    TheoremError,
    check_theorems,
    measurer,
    pairs,
)
from benchmarks.models.convnets import check_model, make_model
from benchmarks.optimizers.recipes import OPTIMIZERS, RECIPES, Curvature
from benchmarks.training.loop import Task, Trainer
from benchmarks.training.options import exit_with
from benchmarks.training.timing import settings as machine

# One colour for each method; dotted with location factors, dash-dotted with a low rank.
_STYLES = {
    "KFAC": "C0-", "EKFAC": "C1-", "TKFAC": "C2-", "TKFAC location": "C2:", "TEKFAC": "C3-",
    "TEKFAC location": "C3:", "TEKFAC low rank": "C4-.", FLOOR: "k--",
}  # fmt: skip

# --- along a training run ------------------------------------------------------------------------


def moments(steps: int, points: int) -> list[int]:
    """The steps after which to measure: 0 to the last, closer at first, when more changes."""
    return sorted({round(steps * (k / (points - 1)) ** 2) for k in range(points)})


def study(task: Task, options: Any) -> Iterator[Point]:
    """Trains, and yields a point at each of the moments; may raise a `TheoremError`."""
    count = len(task.dataset.train_labels)
    if options.examples > count:
        raise UsageError(
            f"{options.examples} examples were asked for, but there are {count}: choose --examples "
            f"from 1 to {count}"
        )
    chosen = np.random.default_rng(options.seed).permutation(count)[: options.examples]
    trainer = Trainer(task, options.optimizer, Curvature(10, 10, 10))
    state = trainer.initial_state(options.seed)
    measure = measurer(
        task.model, (state.params, state.batch_stats),
        task.dataset.train_inputs[chosen], task.dataset.train_labels[chosen],
    )  # fmt: skip
    total = options.epochs * task.steps_per_epoch
    rate = optax.cosine_decay_schedule(options.learning_rate, total)
    due = moments(total, options.points)
    batches = (
        batch
        for epoch in range(1, options.epochs + 1)
        for batch in task.batches(options.seed, epoch)
    )
    for step in range(total + 1):
        if step in due:
            point = measure(step, jax.device_get((state.params, state.batch_stats)))
            if not math.isfinite(point.loss):
                raise UsageError(
                    f"the training has diverged by step {step}: choose a --learning-rate below "
                    f"{options.learning_rate:g}"
                )
            check_theorems(point)
            yield point
        if step < total:
            state, _ = trainer.compiled(state, *next(batches), jnp.float32(rate(step)))


# --- the command ---------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, checked."""
    images = [name for name, examples in DATASETS.items() if examples == "images"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.approximation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(images)} (default: digits)")
    add("--data", type=Path, metavar="DIR", help="directory with the data set; digits need none")
    add("--subset", type=int, metavar="N", help="train with N examples only")
    add("--model", default="cnn", help="a model for images (default: cnn)")
    add("--width", type=int, default=8, help="channels of the first convolution (default: 8)")
    add(
        "--optimizer",
        default="tekfac",
        help=f"optimizer of the training: {', '.join(OPTIMIZERS)} (default: tekfac)",
    )
    add("--learning-rate", type=float, help="falls along half a cosine (default: the optimizer's)")
    add("--epochs", type=int, default=10, help="length of the training (default: 10)")
    add("--batch-size", type=int, default=64, help="batch size of the training (default: 64)")
    add("--points", type=int, default=8, help="number of measurements, both ends included: 2 or "
        "more (default: 8)")  # fmt: skip
    add("--examples", type=int, default=256, help="examples of the Fisher (default: 256)")
    add("--seed", type=int, default=0, help="seed of parameters, batches and examples (default: 0)")
    add("--out", type=Path, default=Path("out"), metavar="DIR",
        help="where approximation.json and approximation.png go (default: out)")  # fmt: skip
    options = parser.parse_args(argv)
    check_choice("dataset", options.dataset, tuple(images))
    check_model(options.model, options.dataset, "images")
    check_choice("optimizer", options.optimizer, OPTIMIZERS)
    for name, least in (("width", 1), ("epochs", 1), ("batch_size", 1), ("points", 2),
                        ("examples", 1), ("seed", 0)):  # fmt: skip
        value = getattr(options, name)
        if value < least:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be {least} or more, got {value}")
    if options.learning_rate is None:
        options.learning_rate = RECIPES[options.optimizer].start
    if not 0 < options.learning_rate < math.inf:
        raise UsageError(f"--learning-rate must be positive, got {options.learning_rate:g}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Runs the study; code 2 and a sentence if it cannot, code 1 if a theorem fails."""
    try:
        _run(parse(argv))
    except (DataError, UsageError) as error:
        exit_with(error, "approximation")
    except TheoremError as error:
        raise SystemExit(f"python -m benchmarks.approximation: {error}") from error


def _run(options: argparse.Namespace) -> None:
    console = Console()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {options.out} ({error.strerror}): choose another --out"
        ) from error
    dataset = load_dataset(options.dataset, options.data, options.subset)
    task = Task(
        dataset, make_model(options.model, dataset.num_classes, options.width), options.batch_size
    )
    title = (
        f"{options.model} ({task.num_parameters:,} parameters) on {options.dataset}, "
        f"{len(dataset.train_labels)} images, trained with {options.optimizer} at "
        f"{options.learning_rate:g}; Fisher over {options.examples}"
    )
    print(title, flush=True)
    points = []
    with console.status("compiling") as status:
        for point in study(task, options):
            points.append(point)
            status.update(f"step {point.step}: loss {point.loss:.2g}")
    show(console, points)
    for line in (sentences := summary(points)):
        print(line)
    draw(options.out / "approximation.png", points, title)
    # Paths on this machine say nothing about the study.
    asked = {name: value for name, value in vars(options).items() if name not in ("data", "out")}
    record = {
        "settings": {
            **asked, "parameters": task.num_parameters, "tekfac_jax": tekfac.__version__,
            **machine(),
        },
        "summary": sentences,
        "points": [point._asdict() for point in points],
    }  # fmt: skip
    path = options.out / "approximation.json"
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"\nwritten: {path}, {path.with_suffix('.png')}")


def summary(points: list[Point]) -> list[str]:
    """How often each inequality held, in sentences."""
    cases = sum(len(point.layers) for point in points)
    lines = [
        "Theorem 3.1 (TEKFAC ≤ TKFAC, EKFAC ≤ KFAC): held in all of the "
        f"{cases} cases ({len(points)} points, {len(points[0].layers)} layers)."
    ]
    for better, worse in USUAL:
        found = [first <= second for _, _, first, second in pairs(points, better, worse)]
        lines.append(f"{better} ≤ {worse} (no theorem): in {sum(found)} of {len(found)}.")
    return lines


def show(console: Console, points: list[Point]) -> None:
    """A row for each layer and point, a column for each method; plain text without a terminal."""
    header = ["layer", "step", "loss", *METHODS, FLOOR]
    rows = [
        [
            path,
            str(point.step),
            f"{point.loss:.2g}",
            *(_cell(point.layers[path][m]) for m in header[3:]),
        ]
        for path in points[0].layers
        for point in points
    ]
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for i, name in enumerate(header):
            # Folded if the terminal is narrow: cut off, two layers could have the same name.
            table.add_column(
                name.replace(" ", "\n"), justify="right" if i else "left", overflow="fold"
            )
        for i, row in enumerate(rows):
            table.add_row(*row, end_section=(i + 1) % len(points) == 0)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        first, *others = (cell for cell in row)
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def _cell(error: float | None) -> str:
    return "-" if error is None else f"{error:.3f}"


def draw(path: Path, points: list[Point], title: str) -> None:
    """The errors of each layer over the training: a line for each method, the floor dashed."""
    layers = list(points[0].layers)
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(max(8.0, 3 * columns), 1.4 + 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, layer in zip(axes, layers, strict=False):
        for method, style in _STYLES.items():
            errors = [point.layers[layer][method] for point in points]
            values = [math.nan if error is None else error for error in errors]
            axis.plot(values, style, label=method, linewidth=1.3)
        axis.set_title(layer, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.set_xticks(range(len(points)), [str(point.step) for point in points])
        axis.tick_params(axis="x", labelrotation=90 if len(points) > 8 else 0)
    for axis in axes[len(layers) :]:
        axis.remove()
    figure.supylabel("‖F − F̂‖ / ‖F‖")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
        title="relative error over the steps of the training", frameon=False,
    )  # fmt: skip
    figure.suptitle(title, fontsize="medium", wrap=True)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
