"""Two figures on many workloads: the performance profile, and all training curves."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.reporting.standings import Cell, Standings, profile
from benchmarks.reporting.workloads import LIMITS

_COLUMNS = 4


def save_profile(path: Path, found: Standings) -> None:
    """For each entry the share of its workloads on which it is within a factor of the best."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label, style in _styles(found).items():
        ratios = found.over_best(label)
        if ratios:
            shares = profile(ratios, LIMITS)
            axes.plot(LIMITS, shares, label=f"{label} ({len(ratios)})", **style)
    axes.set(
        xlabel="final training loss over the best of all", ylim=(0, 1.02),
        xlim=(1, LIMITS[-1]), ylabel="share of the workloads", xscale="log",
    )  # fmt: skip
    ticks = (1, 1.1, 1.2, 1.5, 2, 3)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", title="(workloads)")
    figure.savefig(path, dpi=120)


def save_curves(path: Path, found: Standings) -> None:
    """A panel for each workload: training losses over steps, each entry at its best rate."""
    rows = math.ceil(len(found.workloads) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 1 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    styles, handles = _styles(found), {}
    for panel, workload in zip(panels, found.workloads, strict=False):
        for label, style in styles.items():
            cell = found.cells.get((label, workload))
            if cell is not None:
                handles[label] = _draw(panel, cell, style)
        panel.set(title=workload, yscale="log")
        panel.yaxis.set_major_formatter(LogFormatter())  # plain numbers instead of powers of ten
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        panel.grid(alpha=0.3)
    for panel in panels[len(found.workloads) :]:
        panel.axis("off")
    figure.legend(
        [handles[label] for label in styles if label in handles],
        [label for label in styles if label in handles], loc="outside right center",
    )  # fmt: skip
    figure.supxlabel("step")
    figure.supylabel("training loss")
    figure.savefig(path, dpi=100)


def _draw(panel: Axes, cell: Cell, style: Mapping[str, Any]) -> Any:
    """The mean over the seeds; if some are lost, the first of these, up to where it ended."""
    runs = next(([run] for run in cell.runs if run.lost), cell.runs)
    curves = [[math.nan if x is None else x for x in run.losses] for run in runs]
    mean = np.mean(curves, axis=0)
    steps = np.linspace(0, runs[0].taken, len(mean), endpoint=False)
    (line,) = panel.plot(steps, mean, **style)
    return line


def _styles(found: Standings) -> dict[str, dict[str, Any]]:
    """A colour for each optimizer; other rates or options of it are dashed."""
    colors, styles, seen = matplotlib.colormaps["tab10"], {}, {}
    for label in found.labels:
        uses = seen.setdefault(found.entries[label].optimizer, [len(seen), 0])
        styles[label] = {
            "color": colors(uses[0] % colors.N),
            "linestyle": ("-", "--", ":", "-.")[uses[1] % 4],
            "linewidth": 2.0 if found.entries[label].optimizer == "tekfac" else 1.0,
        }
        uses[1] += 1
    return styles
