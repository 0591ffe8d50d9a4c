"""The report on many workloads: tables in Markdown, and everything as JSON."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.problems.records import Record
from benchmarks.reporting.markdown import markdown
from benchmarks.reporting.standings import Cell, Standings, geometric_mean, profile

_DASH = "–"
LIMITS = tuple(1 + 0.01 * step for step in range(201))  # of the profile: up to 3 times the best

_HOW_TO_READ = """\
- Training losses are means over the last 5 % of a run's steps, then over the seeds. Each optimizer
  is at the best of its learning rates by this loss; all have equally many.
- A loss below 1 % of its start counts as 1 %: the set is fitted. A lost run (not finite, or its
  final loss above the start) counts with the loss of its first step.
- Ratios are averaged geometrically. Validation errors are the metric itself where lower is better,
  else what is missing to 100 %, and at least 1 %.
- Steps to Adam's loss: until the running mean over 5 % of a run reaches Adam's last one, over the
  same for Adam. Seconds: the same times the ratio of the mean step times, without compilation.
- Plateau: decades between the outermost rates around the best one whose losses are within 5 % of
  the lowest, among the rates that were run.
- Entries that lack a run on a workload are left out there; `workloads` is the number that count."""


def report(standings: Standings, images: Iterable[str]) -> str:
    """Everything as Markdown."""
    found = standings
    parts = [
        "# Workloads",
        "## Over all workloads",
        summary(found),
        *(f"![{image}]({image})" for image in images),
        "## Final training loss over Adam's",
        _by_workload(found, found.loss_over_adam, "{:.2f}", mean=True),
        "## Final training loss over the best of the other optimizers",
        _by_workload(found, found.loss_over_others, "{:.2f}", mean=True),
        "## Final training loss, and the learning rate",
        _of_cells(found, lambda c: f"{c.loss:.3g} ({c.best_rate:g}){_lost(c)}"),
        "## Validation",
        _of_cells(found, lambda c: _number(c.validation, "{:.3g}"), metric=True),
        "## Steps to Adam's final loss, over Adam's",
        _by_workload(found, found.steps_over_adam, "{:.2f}"),
        "## Seconds to Adam's final loss, over Adam's",
        _by_workload(found, found.seconds_over_adam, "{:.2f}"),
        "## Milliseconds a step: median, mean",
        _of_cells(found, lambda c: f"{c.mean_of('median_step_ms'):.1f}, "
                  f"{c.mean_of('mean_step_ms'):.1f}"),
        "## Plateau in decades of the learning rate",
        _of_cells(found, lambda c: f"{c.plateau:.1f}"),
        "## How to read it",
        "\n".join([_HOW_TO_READ, *(f"- {note}" for note in notes(found))]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def summary(found: Standings) -> str:
    """A row for each entry, over its workloads."""
    header = [
        "", "workloads", "loss / Adam", "loss / best other", "worst loss / Adam",
        "validation error / Adam", "reach Adam's loss", "steps / Adam", "seconds / Adam",
        "lost runs", "plateau, decades",
    ]  # fmt: skip
    rows = []
    for label in found.labels:
        numbers = overall(found, label)
        if not numbers["workloads"]:
            continue
        names = ("loss_over_adam", "loss_over_others", "worst_over_adam", "error_over_adam")
        rows.append([
            label, str(numbers["workloads"]),
            *(_number(numbers[name], "{:.2f}") for name in names),
            f"{numbers['reached']} of {numbers['comparable']}",
            *(_number(numbers[f"{unit}_over_adam"], "{:.2f}") for unit in ("steps", "seconds")),
            f"{numbers['lost']} of {numbers['runs']}", f"{numbers['plateau']:.2f}",
        ])  # fmt: skip
    return markdown(header, rows)


def overall(found: Standings, label: str) -> dict[str, Any]:
    """An entry over all its workloads; steps and seconds are over those that reach Adam's loss."""
    cells = found.of(label)
    if not cells:
        return {"workloads": 0}
    losses = [found.loss_over_adam(label, w) for w in cells]
    steps = [found.steps_over_adam(label, w) for w in cells]
    seconds = [found.seconds_over_adam(label, w) for w in cells]
    return {
        "workloads": len(cells),
        "loss_over_adam": geometric_mean(losses),
        "loss_over_others": geometric_mean(found.loss_over_others(label, w) for w in cells),
        "worst_over_adam": max((x for x in losses if not math.isnan(x)), default=math.nan),
        "error_over_adam": geometric_mean(found.error_over_adam(label, w) for w in cells),
        "comparable": sum(not math.isnan(x) for x in steps),
        "reached": sum(math.isfinite(x) for x in steps),
        "steps_over_adam": geometric_mean(filter(math.isfinite, steps)),
        "seconds_over_adam": geometric_mean(filter(math.isfinite, seconds)),
        "lost": sum(c.lost for c in cells.values()),
        "runs": sum(c.total for c in cells.values()),
        "plateau": statistics.fmean(c.plateau for c in cells.values()),
    }


def _by_workload(
    found: Standings, value: Callable[[str, str], float], form: str, *, mean: bool = False
) -> str:
    """A row for each workload, a column for each entry, and the geometric mean below."""
    rows = [
        [w, *(_number(value(label, w), form) for label in found.labels)] for w in found.workloads
    ]
    if mean:
        means = (geometric_mean(value(x, w) for w in found.of(x)) for x in found.labels)
        rows.append(["geometric mean", *(_number(x, form) for x in means)])
    return markdown(["", *found.labels], rows)


def _of_cells(found: Standings, show: Callable[[Cell], str], *, metric: bool = False) -> str:
    rows = []
    for workload in found.workloads:
        cells = [found.cells.get((label, workload)) for label in found.labels]
        one = next((cell.runs[0] for cell in cells if cell), None)
        about = f" ({_metric(one)})" if metric and one else ""
        rows.append([workload + about, *(show(cell) if cell else _DASH for cell in cells)])
    return markdown(["", *found.labels], rows)


def _metric(record: Record) -> str:
    return f"{record.metric}, {'higher' if record.higher_is_better else 'lower'} is better"


def _lost(cell: Cell) -> str:
    return f", {cell.lost} of {cell.total} lost" if cell.lost else ""


def _number(x: float, form: str) -> str:
    if math.isnan(x):
        return _DASH
    return form.format(x) if math.isfinite(x) else "never"


def notes(found: Standings) -> list[str]:
    """What a reader must know to trust the tables."""
    records = [record for entry in found.entries.values() for record in entry.records]
    seeds = {len(cell.runs) for cell in found.cells.values()}
    noted = [f"seeds: {', '.join(map(str, sorted(seeds)))}"]
    noted += [
        f"{label}: rates {', '.join(f'{rate:g}' for rate in entry.rates)}"
        for label, entry in found.entries.items()
    ]
    noted += [
        f"not finished, so left out: {label} on {workload}"
        for label in found.labels
        for workload in found.workloads
        if (label, workload) not in found.cells
    ]
    noted += [
        f"**{optimizer}: {len(states)} states of the library are mixed ({', '.join(states)})**"
        for optimizer, states in mixed(records).items()
    ]
    machines = {f"{r.machine['device']}, {r.machine['cores']} cores, "
                f"jax {r.versions['jax']}" for r in records}  # fmt: skip
    noted += [f"machine: {machine}" for machine in sorted(machines)]
    loads = [r.machine["load"] for r in records if r.machine["load"] is not None]
    if loads:
        noted.append(
            f"load average of the machine: {min(loads):.1f} to {max(loads):.1f}; seconds of runs "
            "under different loads do not compare"
        )
    return noted


def mixed(records: Iterable[Record]) -> dict[str, list[str]]:
    """The library's own optimizers whose runs were made by different states of it."""
    states: dict[str, set[str]] = {}
    for record in records:
        if record.optimizer.endswith("fac"):
            states.setdefault(record.optimizer, set()).add(record.library)
    return {name: sorted(found) for name, found in states.items() if len(found) > 1}


def as_json(found: Standings) -> dict[str, Any]:
    """The figures of the tables."""
    return {
        label: {
            "optimizer": entry.optimizer,
            "rates": list(entry.rates),
            "overall": overall(found, label),
            "profile": _profile(found, label),
            "workloads": {w: _cell(found, label, w) for w in found.of(label)},
        }
        for label, entry in found.entries.items()
    }


def _profile(found: Standings, label: str) -> dict[str, Any]:
    ratios = found.over_best(label)
    return {"limits": list(LIMITS), "share": profile(ratios, LIMITS) if ratios else []}


def _cell(found: Standings, label: str, workload: str) -> dict[str, Any]:
    cell = found.cells[label, workload]
    values = ("loss_over_adam", "loss_over_others", "error_over_adam", "steps_over_adam",
              "seconds_over_adam")  # fmt: skip
    return {
        "best_rate": cell.best_rate,
        "losses": {f"{rate:g}": loss for rate, loss in cell.losses.items()},
        "validation": cell.validation,
        "metric": cell.runs[0].metric,
        "higher_is_better": cell.runs[0].higher_is_better,
        "plateau": cell.plateau,
        "lost": cell.lost,
        "runs": cell.total,
        "median_step_ms": cell.mean_of("median_step_ms"),
        "mean_step_ms": cell.mean_of("mean_step_ms"),
        "compile_seconds": cell.mean_of("compile_seconds"),
        **{name: getattr(found, name)(label, workload) for name in values},
    }
