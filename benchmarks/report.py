"""Tables and figures of what `benchmarks.paper` has measured: ``python -m benchmarks.report DIR``.

Reads the JSON in DIR and below it, finished or not; writes ``report.md`` and a PNG for each
experiment into DIR, and prints the tables.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.errors import DataError
from benchmarks.reporting.markdown import markdown
from benchmarks.reporting.results import Outcome, Results, plateau, read
from benchmarks.reporting.summary import mean_and_spread, save_curves
from benchmarks.training.options import exit_with

_DASH = "–"


def main(argv: list[str] | None = None) -> None:
    """Draws everything; ends with code 2 and one sentence if there is nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("directory", type=Path, help="the --out directory of benchmarks.paper")
    directory = parser.parse_args(argv).directory
    try:
        found = read(directory)
    except DataError as error:
        exit_with(error, "report")
    sections = [section(results, directory) for results in found]
    overview = published_overview(found)
    text = "\n\n".join([*([overview] if overview else []), *sections]) + "\n"
    (directory / "report.md").write_text(text)
    print(text)
    print(f"written: {directory / 'report.md'}")


def section(results: Results, directory: Path) -> str:
    """Heading, table, figure and notes of an experiment, as Markdown."""
    described = results.description
    stem = directory / results.name
    draw(results, stem.with_suffix(".png"))
    parts = [f"## {described['title']}", *tables(results)]
    for image in (stem.with_suffix(".png"), _curves_beside(stem)):
        if image.exists():
            parts.append(f"![{described['title']}]({image.name})")
    parts.append("\n".join(f"- {note}" for note in notes(results)))
    return "\n\n".join(parts)


def _curves_beside(image: Path) -> Path:
    return image.with_name(f"{image.stem}_curves.png")


# --- tables ----------------------------------------------------------------------------------


def tables(results: Results) -> list[str]:
    """Its tables, each narrow enough for a page of about 100 characters."""
    tabulate = {"comparison": comparison, "sweep": sweep, "ablation": ablation}
    return tabulate[results.description["view"]](results)


def comparison(results: Results) -> list[str]:
    """Optimizers side by side, with published figures if there are any.

    One table in epochs and one in seconds.
    """
    outcomes = results.outcomes
    targets = {name: x for name, x in results.description["targets"].items() if x is not None}
    published = (results.description["published"] or {}).get("accuracy", {})
    to_targets = [
        f"to {100 * target:g} %" if name == "test_accuracy" else f"to loss {target:g}"
        for name, target in targets.items()
    ]

    def reached(outcome: Outcome, unit: str) -> list[str]:
        found = [_mean(outcome.first(name, x, unit), "{:.1f}") for name, x in targets.items()]
        if outcome is outcomes[0]:
            return [*found, _DASH]
        return [*found, _mean(outcomes[0].share_of(outcome, unit), "{:.2f}")]

    chosen, settings = _chosen(outcomes)
    in_epochs, in_seconds = [], []
    for outcome, setting in zip(outcomes, settings, strict=True):
        paper = [_published(published.get(outcome.label))] if published else []
        final = [outcome.label, setting, *_final(outcome), *paper]
        in_epochs.append([*final, *reached(outcome, "epoch")])
        seconds, steps = _times(outcome)
        in_seconds.append([outcome.label, seconds, *reached(outcome, "seconds"), steps])
    paper = ["paper %"] if published else []
    header = ["epochs", chosen, "train loss", "accuracy %", *paper, *to_targets, "share"]
    return [
        markdown(header, in_epochs),
        markdown(["seconds", "in all", *to_targets, "share", "ms/step"], in_seconds),
    ]


def ablation(results: Results) -> list[str]:
    """Every entry beside the first one."""
    base = results.outcomes[0].mean_accuracy()
    chosen, settings = _chosen(results.outcomes)
    header = ("", chosen, "train loss", "accuracy %", "change", "seconds", "ms/step")
    rows = []
    for outcome, setting in zip(results.outcomes, settings, strict=True):
        change = outcome.mean_accuracy() - base
        shown = f"{change:+.2f}" if math.isfinite(change) else _DASH
        rows.append([outcome.label, setting, *_final(outcome), shown, *_times(outcome)])
    return [markdown(header, rows)]


def sweep(results: Results) -> list[str]:
    """Test accuracy over one setting, a row for each combination of the others."""
    axis, groups, values = _swept(results)
    published = (results.description["published"] or {}).get("accuracy", {})
    header = [f"accuracy % by {axis}", *(f"{value:g}" for value in values), "plateau"]
    rows = []
    for label, group in groups.items():
        cells = [_mean(group[v].accuracies, "{:.2f}") if v in group else _DASH for v in values]
        width = plateau(sorted(group), [group[v].mean_accuracy() for v in sorted(group)])
        rows.append([label, *cells, _DASH if math.isnan(width) else f"{width:.1f}"])
        if published:
            by_value = {v: published.get(group[v].label) for v in group}
            rows.append(["paper", *(_published(by_value.get(v)) for v in values), ""])
    return [markdown(header, rows)]


def _swept(results: Results) -> tuple[str, dict[str, dict[float, Outcome]], list[float]]:
    """The setting that varies, the rows of its table, and its values."""
    axis, *others = results.description["axes"]
    groups = sweep_groups(results.outcomes, axis, others)
    return axis, groups, sorted({value for group in groups.values() for value in group})


def sweep_groups(
    outcomes: Sequence[Outcome], axis: str, others: Sequence[str]
) -> dict[str, dict[float, Outcome]]:
    """Row of the table -> value of the setting -> outcome; entries without runs are left out.

    The row's name omits settings that the optimizer does not have.
    """
    groups: dict[str, dict[float, Outcome]] = {}
    for outcome in outcomes:
        settings = outcome.settings
        if settings is None or not outcome.records:
            continue
        named = [f"{name} {settings[name]:g}" for name in others if name in settings]
        groups.setdefault(", ".join([outcome.optimizer, *named]), {})[settings[axis]] = outcome
    return groups


def published_overview(found: Sequence[Results]) -> str:
    """The paper's Table 3: our figures beside the published ones, where these exist."""
    compared = [
        r for r in found if r.description["published"] and r.description["view"] == "comparison"
    ]
    if len(compared) < 2:
        return ""
    labels = list(dict.fromkeys(
        label for r in compared for label in r.description["published"]["accuracy"]
    ))  # fmt: skip
    rows = []
    for results in compared:
        published = results.description["published"]["accuracy"]
        ours = {outcome.label: outcome for outcome in results.outcomes}
        cells = [
            f"{_mean(ours[label].accuracies, '{:.2f}')} ({_published(published.get(label))})"
            for label in labels
        ]
        rows.append([results.description["title"], *cells])
    source = compared[0].description["published"]["source"]
    heading = f"## Test accuracy in %, in brackets {source}"
    return heading + "\n\n" + markdown(["", *labels], rows)


def notes(results: Results) -> list[str]:
    """What a reader must know to trust the table."""
    described, outcomes = results.description, results.outcomes
    seeds = len(described["seeds"])
    found = [
        f"`python -m benchmarks.paper {described['name']}`; {described['epochs']} epochs, "
        f"{seeds} seeds; mean ± standard deviation over the seeds. Seconds are those of the "
        "training steps, without compilation and evaluation; ms/step: median, mean; train loss is "
        "that of the trained network, a loss to be reached the mean over the steps of an epoch; "
        "accuracy is that on test images."
    ]
    if described["view"] == "comparison":
        found.append(
            f"share: the epochs, seconds that {outcomes[0].label} needs to reach the other's least "
            "training loss in any epoch, as a share of what the other needs"
        )
    missing = [o.label for o in outcomes if len(o.records) < seeds]
    if missing:
        found.append(f"not finished: {', '.join(missing)}")
    searched = [e for e in described["entries"] if e["grid_size"] > 1]
    if searched:
        rungs = ", ".join(f"{r['epochs']} (keeps {r['keep']})" for r in described["rungs"])
        found.append(f"tuned by successive halving on the training loss: epochs {rungs}")
        for size in sorted({e["grid_size"] for e in searched}):
            of = ", ".join(e["label"] for e in searched if e["grid_size"] == size)
            tried = min(size, described["trials"])
            how = "all" if tried == size else f"a fixed, even sample of {tried}"
            found.append(f"{how} of a grid of {size}: {of}")
    found += [
        f"{outcome.label}: the best {name} is at the edge of its grid"
        for outcome in outcomes
        for name in outcome.at_edge()
    ]
    for outcome in outcomes:
        diverged = sum(record["diverged"] for record in outcome.records)
        failures = sum(record["failures"] for record in outcome.records)
        if diverged:
            found.append(f"{outcome.label}: {diverged} of {len(outcome.records)} runs diverged")
        if failures:
            found.append(f"{outcome.label}: {failures} statistics or decompositions not finite")
    loads = [r["machine"]["load"] for o in outcomes for r in o.records if r["machine"]["load"]]
    found += [f"machine: {machine}" for machine in _machines(outcomes)]
    if loads:
        found.append(
            f"load average of the machine: {min(loads):.1f} to {max(loads):.1f}; seconds of runs "
            "under different loads do not compare"
        )
    return found


def _machines(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted(
        {
            f"{r['machine']['device']}, {r['machine']['cores']} cores, jax {r['versions']['jax']}"
            for outcome in outcomes
            for r in outcome.records
        }
    )


def _chosen(outcomes: Sequence[Outcome]) -> tuple[str, list[str]]:
    """Header and cells of the settings that were searched: "rate" if only the learning rate was."""
    names = [[x for x in o.settings or {} if x in o.grid] or ["learning_rate"] for o in outcomes]
    only_rates = all(searched == ["learning_rate"] for searched in names)
    cells = []
    for outcome, searched in zip(outcomes, names, strict=True):
        shown = [(name, _number((outcome.settings or {}).get(name))) for name in searched]
        text = ", ".join(value if only_rates else f"{name} {value}" for name, value in shown)
        cells.append(_DASH if outcome.settings is None else text)
    return "rate" if only_rates else "chosen", cells


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _final(outcome: Outcome) -> list[str]:
    return [
        _mean(outcome.train_losses, "{:.3f}"),
        _mean(outcome.accuracies, "{:.2f}"),
    ]


def _times(outcome: Outcome) -> list[str]:
    """Seconds in all; median and mean milliseconds of a step."""
    if not outcome.records:
        return [_DASH] * 2
    seconds = [r["curve"][-1]["seconds"] if r["curve"] else math.nan for r in outcome.records]
    return [
        _mean(seconds, "{:.1f}"),
        f"{outcome.median('median_step_ms'):.1f}, {outcome.median('mean_step_ms'):.1f}",
    ]


def _published(figures: Sequence[float] | None) -> str:
    return _DASH if figures is None else f"{figures[0]:.2f} ± {figures[1]:.2f}"


def _mean(values: Sequence[float], form: str, *, spread: bool = True) -> str:
    shown = mean_and_spread(values, form, spread=spread)
    return _DASH if shown == "-" else shown


# --- figures ---------------------------------------------------------------------------------


def draw(results: Results, image: Path) -> None:
    """What suits the experiment: curves, a dot for each seed, or accuracy over a setting."""
    view = results.description["view"]
    if view == "comparison":
        _save_curves(results, image)
    elif view == "ablation":
        _save_bars(results, image)
    else:
        axis, groups, values = _swept(results)
        _save_sweep(groups, values, axis, image, results)
        if len(groups) == 1:
            _save_curves(results, _curves_beside(image))


def _save_curves(results: Results, image: Path) -> None:
    """Loss and accuracy over epochs and over seconds: Figure 3, and Figure 4 (b)."""
    drawn = [outcome.as_result() for outcome in results.outcomes if outcome.records]
    if drawn:
        save_curves(image, drawn, results.description["title"])


def _save_bars(results: Results, image: Path) -> None:
    """Final test accuracy of each entry, a dot for each seed."""
    drawn = [outcome for outcome in results.outcomes if outcome.records]
    if not drawn:
        return
    figure = Figure(figsize=(7, 1 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    for row, outcome in enumerate(drawn):
        axes.plot(outcome.accuracies, [row] * len(outcome.records), "o", color="C0", alpha=0.5)
        axes.plot(outcome.mean_accuracy(), row, "|", color="black", markersize=14)
    axes.axvline(drawn[0].mean_accuracy(), color="black", linewidth=0.8, alpha=0.5)
    axes.set_yticks(range(len(drawn)), [outcome.label for outcome in drawn])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set(xlabel="final test accuracy in %", title=results.description["title"])
    figure.savefig(image, dpi=120)


def _save_sweep(
    groups: dict[str, dict[float, Outcome]], values: Sequence[float], axis: str, image: Path,
    results: Results,
) -> None:  # fmt: skip
    """Final test accuracy as curves (Figure 4 (a)), and as a heat map with a row for each."""
    if not groups:
        return
    figure = Figure(figsize=(13, 3 + 0.4 * len(groups)), layout="constrained")
    curves, heat = figure.subplots(1, 2)
    published = (results.description["published"] or {}).get("accuracy", {})
    for label, group in groups.items():
        known = sorted(group)
        curves.plot(known, [group[v].mean_accuracy() for v in known], "o-", label=label)
        paper = {v: published[group[v].label][0] for v in known if group[v].label in published}
        if paper:
            curves.plot(list(paper), list(paper.values()), "x:", color="black", label="paper")
    curves.set(xscale="log", xlabel=axis, ylabel="final test accuracy in %")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8)
    table = np.array(
        [[g[v].mean_accuracy() if v in g else np.nan for v in values] for g in groups.values()]
    )
    heat.imshow(table, aspect="auto", cmap="Blues", alpha=0.6)
    for row, column in itertools.product(*map(range, table.shape)):
        if np.isfinite(table[row, column]):
            text = f"{table[row, column]:.1f}"
            heat.text(column, row, text, ha="center", va="center", fontsize=8)
    heat.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    heat.set_yticks(range(len(groups)), list(groups))
    heat.set_xlabel(axis)
    figure.suptitle(results.description["title"])
    figure.savefig(image, dpi=120)


if __name__ == "__main__":
    main()
