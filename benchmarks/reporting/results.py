"""Reads back what `benchmarks.paper` has written to a directory, from the JSON alone."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.errors import DataError
from benchmarks.reporting.summary import Result
from benchmarks.training.loop import Epoch, Run


class Outcome(NamedTuple):
    """An entry's runs."""

    label: str
    optimizer: str
    settings: dict[str, Any] | None  # fixed, and chosen by the search; None: not yet
    grid: dict[str, list[Any]]
    records: list[dict[str, Any]]  # finished runs, by seed
    trials: int  # runs of the search

    @property
    def accuracies(self) -> list[float]:
        """Final test accuracy in %; NaN if the run diverged."""
        return [
            math.nan if r["diverged"] else 100 * r["curve"][-1]["test_accuracy"]
            for r in self.records
        ]

    @property
    def train_losses(self) -> list[float]:
        """Losses of the trained networks on the training set; NaN if the run diverged."""
        return [math.nan if r["diverged"] else r["train_loss"] for r in self.records]

    def mean_accuracy(self) -> float:
        """Mean over the seeds; NaN if there are no runs, or one diverged."""
        return statistics.fmean(self.accuracies) if self.records else math.nan

    def first(self, quantity: str, target: float, unit: str) -> list[float]:
        """When each run reached a target; NaN if it never did.

        Args:
            quantity: ``"train_loss"`` (to fall to the target) or ``"test_accuracy"`` (to rise).
            target: the value to reach.
            unit: ``"epoch"`` or ``"seconds"``.
        """
        sign = -1 if quantity == "train_loss" else 1
        return [
            next((e[unit] for e in r["curve"] if sign * e[quantity] >= sign * target), math.nan)
            for r in self.records
        ]

    def share_of(self, other: "Outcome", unit: str) -> list[float]:
        """This one's time to the other's best loss, as a share of the other's time to it.

        Time is in epochs or seconds. The best loss is the least training loss of any epoch. One
        share for each seed that both have; NaN if this one never reaches the other's best loss.
        """
        own = {record["seed"]: record["curve"] for record in self.records}
        shares = []
        for record in other.records:
            if record["seed"] not in own or not record["curve"]:
                continue
            best = min(record["curve"], key=lambda epoch: epoch["train_loss"])
            reached = (
                epoch[unit]
                for epoch in own[record["seed"]]
                if epoch["train_loss"] <= best["train_loss"]
            )
            shares.append(next(reached, math.nan) / best[unit])
        return shares

    def median(self, name: str) -> float:
        """Median over the runs of one number in their records."""
        values = [record[name] for record in self.records]
        return statistics.median(values) if values else math.nan

    def at_edge(self) -> list[str]:
        """Settings whose best value ends its grid: values beyond it may be better."""
        if self.settings is None:
            return []
        return [
            name
            for name, values in self.grid.items()
            if len(values) > 2 and self.settings[name] in (min(values), max(values))
        ]

    def as_result(self) -> Result:
        """The runs as `summary` draws them."""
        rate = (self.settings or {}).get("learning_rate", math.nan)
        runs = [
            Run(
                self.label, rate, record["seed"], [Epoch(**epoch) for epoch in record["curve"]],
                math.inf if record["diverged"] else record["train_loss"], [],
            )
            for record in self.records
        ]  # fmt: skip
        return Result(self.label, rate, None, 0.0, runs)


class Results(NamedTuple):
    """An experiment, finished or not."""

    description: dict[str, Any]
    outcomes: list[Outcome]

    @property
    def name(self) -> str:
        """Name of the experiment's module."""
        return self.description["name"]


def read(directory: Path) -> list[Results]:
    """All experiments in a directory and below it.

    Raises:
        DataError: there is none.
    """
    paths = sorted(directory.glob("**/experiment.json"))
    if not paths:
        raise DataError(
            f"no experiment.json in {directory} or below: pass a directory to which "
            "benchmarks.paper has written"
        )
    return [_read_one(path.parent) for path in paths]


def _read_one(directory: Path) -> Results:
    description = json.loads((directory / "experiment.json").read_text())
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("runs/*.json"))]
    # The experiment may have changed since some of these runs.
    found = [record for record in found if record["task"] == description["task"]]
    outcomes = []
    for entry in description["entries"]:
        own = [record for record in found if record["label"] == entry["label"]]
        settings = description["winners"].get(entry["label"])
        final = [
            record
            for record in own
            if not record["search"]
            and record["settings"] == settings
            and record["epochs"] == description["epochs"]
            and record["schedule"] == description["schedule"]
            and record["seed"] in description["seeds"]
        ]
        outcomes.append(
            Outcome(
                entry["label"], entry["optimizer"], settings, entry["grid"],
                sorted(final, key=lambda record: record["seed"]),
                sum(record["search"] for record in own),
            )
        )  # fmt: skip
    return Results(description, outcomes)


def plateau(values: Sequence[float], accuracies: Sequence[float], within: float = 1.0) -> float:
    """How many decades of a setting are about as good as its best value.

    This is the range around the best value in which the accuracy is at most `within` below the
    best. It is interpolated linearly over the logarithm of the setting and cut off at the ends of
    the grid. A value without a finite accuracy counts as 0 %.

    Args:
        values: values of the setting, ascending.
        accuracies: for each value, in %.
        within: in % points.

    Returns:
        Width in decades; NaN if no accuracy is finite.
    """
    heights = np.nan_to_num(np.asarray(accuracies, float), nan=0.0)
    if not np.isfinite(accuracies).any():
        return math.nan
    x, best = np.log10(values), int(heights.argmax())
    floor = heights[best] - within

    def edge(step: int) -> float:
        i = best
        while 0 <= i + step < len(x) and heights[i + step] >= floor:
            i += step
        j = i + step
        if not 0 <= j < len(x):
            return x[i]
        return x[i] + (x[j] - x[i]) * (heights[i] - floor) / (heights[i] - heights[j])

    return float(edge(1) - edge(-1))
