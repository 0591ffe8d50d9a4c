"""How optimizers compare over many workloads: ratios, geometric means, and their profile.

Losses are positive. They count as follows:

- Below a hundredth of its start, a loss is as good as a hundredth: the set is fitted, and ratios of
  such losses would only measure how long the run went on.
- A lost run counts as if nothing had been trained: with the loss of its first step.
- The best rate is the one with the lowest final training loss, the mean over the seeds.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.problems.plan import Entry
from benchmarks.problems.records import Record

FITTED = 0.01  # share of the start below which losses do not differ
PLATEAU = 0.05  # a rate is on the plateau if its loss is at most so far above the best
_SMOOTHED = 0.05  # share of the run over which the running mean goes, as for the final loss
_LEAST_ERROR = 1.0  # % points: below it errors do not differ, the validation sets are small


def counted(loss: float, start: float) -> float:
    """A loss, or what counts in its place where the set is fitted."""
    return max(loss, FITTED * start)


def final_loss(record: Record) -> float:
    """What a run's final loss counts."""
    if record.lost or record.final is None:
        return record.start
    return counted(record.final, record.start)


class Cell(NamedTuple):
    """An entry on a workload: its losses by rate, and its runs at the best rate."""

    losses: dict[float, float]  # means over the seeds
    best_rate: float
    runs: tuple[Record, ...]  # by seed
    lost: int  # runs of all rates
    total: int

    @property
    def loss(self) -> float:
        """At the best rate."""
        return self.losses[self.best_rate]

    @property
    def validation(self) -> float:
        """The metric at the best rate, the mean over the seeds; NaN if a run was lost."""
        values = [math.nan if r.lost or r.validation is None else r.validation for r in self.runs]
        return statistics.fmean(values)

    @property
    def error(self) -> float:
        """The metric as an error, lower is better: of an accuracy in %, what is missing to 100."""
        value = self.validation
        if not self.runs[0].higher_is_better:
            return value
        return max(100 - value, _LEAST_ERROR) if math.isfinite(value) else math.nan

    @property
    def plateau(self) -> float:
        """Decades of rate, among those that were run, around the best one and nearly as good."""
        return plateau(self.losses)

    def mean_of(self, field: str) -> float:
        """The mean of a number in the records at the best rate."""
        return statistics.fmean(getattr(record, field) for record in self.runs)


def plateau(losses: dict[float, float]) -> float:
    """Decades between the outermost rates around the best one whose losses are within 5 %."""
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    low = high = rates.index(best)
    limit = (1 + PLATEAU) * losses[best]
    while low > 0 and losses[rates[low - 1]] <= limit:
        low -= 1
    while high + 1 < len(rates) and losses[rates[high + 1]] <= limit:
        high += 1
    return math.log10(rates[high] / rates[low])


def cell(entry: Entry, workload: str) -> Cell | None:
    """An entry on a workload, over the seeds that all rates have; None without such seeds."""
    own = {(r.rate, r.seed): r for r in entry.records if r.workload == workload}
    seeds = sorted(
        set.intersection(*({seed for at, seed in own if at == rate} for rate in entry.rates))
    )
    if not seeds:
        return None
    losses = {
        rate: statistics.fmean(final_loss(own[rate, seed]) for seed in seeds)
        for rate in entry.rates
    }
    runs = [own[rate, seed] for rate in entry.rates for seed in seeds]
    best = min(losses, key=losses.__getitem__)
    return Cell(
        losses, best, tuple(own[best, seed] for seed in seeds), sum(r.lost for r in runs), len(runs)
    )


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of the ratios that are known; NaN without any."""
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return statistics.geometric_mean(known) if known else math.nan


def fraction_to(run: Record, target: float) -> float:
    """The fraction of a run after which its running mean has reached a loss; infinite: never."""
    if run.lost:
        return math.inf
    window = max(1, round(_SMOOTHED * len(run.losses)))
    losses = np.array([math.inf if x is None else x for x in run.losses])
    for end in range(window, len(losses) + 1):
        if losses[end - window : end].mean() <= target:
            return end / len(losses)
    return math.inf


def _last_mean(run: Record) -> float:
    """The end of the running mean; the final loss may differ from it in the last digits."""
    window = max(1, round(_SMOOTHED * len(run.losses)))
    return statistics.fmean(math.inf if x is None else x for x in run.losses[-window:])


class Standings:
    """All entries on all workloads.

    Args:
        entries: what is compared; the first one of Adam without options is the reference.

    Workloads are in the order in which they first occur in the records.
    """

    def __init__(self, entries: Sequence[Entry]):
        self.entries = {entry.label: entry for entry in entries}
        self.labels = list(self.entries)
        records = [record for entry in entries for record in entry.records]
        self.workloads = list(dict.fromkeys(record.workload for record in records))
        self.cells = {
            (label, workload): found
            for label, entry in self.entries.items()
            for workload in self.workloads
            if (found := cell(entry, workload)) is not None
        }
        adam = (e.label for e in entries if e.optimizer == "adam" and not e.records[0].options)
        self.reference = next(adam, None)

    def of(self, label: str) -> dict[str, Cell]:
        """Cells of an entry by workload."""
        return {w: self.cells[label, w] for w in self.workloads if (label, w) in self.cells}

    def loss_over_adam(self, label: str, workload: str) -> float:
        """Loss over that of Adam, each at its best rate; NaN if one is missing."""
        own, adam = self._with_reference(label, workload)
        return own.loss / adam.loss if own and adam else math.nan

    def loss_over_others(self, label: str, workload: str) -> float:
        """Loss over the lowest one of all other optimizers."""
        own = self.cells.get((label, workload))
        optimizer = self.entries[label].optimizer
        others = [
            found.loss
            for (other, w), found in self.cells.items()
            if w == workload and self.entries[other].optimizer != optimizer
        ]
        return own.loss / min(others) if own and others else math.nan

    def error_over_adam(self, label: str, workload: str) -> float:
        """Validation error over that of Adam."""
        own, adam = self._with_reference(label, workload)
        return own.error / adam.error if own and adam else math.nan

    def steps_over_adam(self, label: str, workload: str) -> float:
        """Steps to Adam's final loss, over Adam's own; infinite if it is never reached."""
        own, adam = self._with_reference(label, workload)
        if not own or not adam:
            return math.nan
        theirs = {run.seed: run for run in adam.runs}
        return geometric_mean(
            _share(run, theirs[run.seed]) for run in own.runs if run.seed in theirs
        )

    def seconds_over_adam(self, label: str, workload: str) -> float:
        """Seconds to Adam's final loss, over Adam's own, by the mean time of a step."""
        own, adam = self._with_reference(label, workload)
        if not own or not adam:
            return math.nan
        time = own.mean_of("mean_step_ms") / adam.mean_of("mean_step_ms")
        return time * self.steps_over_adam(label, workload)

    def over_best(self, label: str) -> list[float]:
        """For each workload of an entry, its loss over the lowest one of all entries."""
        best = {
            w: min(self.cells[label, w].loss for label in self.labels if (label, w) in self.cells)
            for w in self.workloads
        }
        return [found.loss / best[w] for w, found in self.of(label).items()]

    def _with_reference(self, label: str, workload: str) -> tuple[Cell | None, Cell | None]:
        found = self.cells.get((label, workload))
        return found, self.cells.get((self.reference or "", workload))


def _share(run: Record, adam: Record) -> float:
    if adam.lost:
        return math.nan
    target = counted(_last_mean(adam), adam.start)
    return fraction_to(run, target) / fraction_to(adam, target)


def profile(ratios: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Share of the workloads whose ratio to the best is at most each limit.

    The performance profile of Dolan and Moré 2002.
    """
    return [sum(ratio <= limit for ratio in ratios) / len(ratios) for limit in limits]
