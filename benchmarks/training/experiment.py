"""What an experiment is: a task, optimizers with their grids, and what to report."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from benchmarks.training.halving import Rung
from benchmarks.training.loop import COSINE, Schedule

SEARCH_SEED = 1_000_000  # other parameters and another order of the data than in final runs
# The table of an experiment: optimizers side by side, a sweep over settings, or each entry beside
# the first one.
View = Literal["comparison", "sweep", "ablation"]


class TaskSpec(NamedTuple):
    """Network and data. `None` leaves the choice to the data set and the model."""

    dataset: str
    model: str
    subset: int | None = None  # training examples
    width: int | None = None
    batch_size: int = 128
    augment: bool = False  # random crop and horizontal flip
    affine: bool = True  # whether BatchNorm has a scale and a bias
    dtype: str | None = None  # of the computation


class Entry(NamedTuple):
    """An optimizer with its fixed settings, and a grid of those that the search chooses."""

    label: str
    optimizer: str
    grid: Mapping[str, tuple[Any, ...]]  # setting -> values; one value each: no search
    fixed: Mapping[str, Any] = {}


class Targets(NamedTuple):
    """Values to reach; the epoch and second in which they are first reached are reported."""

    train_loss: float | None = None
    test_accuracy: float | None = None  # between 0 and 1


class Published(NamedTuple):
    """Published figures, for the same table."""

    source: str
    accuracy: Mapping[str, tuple[float, float]]  # label -> mean and deviation, in %


class Experiment(NamedTuple):
    """Everything that determines an experiment."""

    title: str
    task: TaskSpec
    entries: tuple[Entry, ...]
    epochs: int
    schedule: Schedule = COSINE
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int | None = None  # of each entry's grid; None: as many as the smallest grid has
    rungs: tuple[Rung, ...] = (Rung(1, 3), Rung(2, 1))
    targets: Targets = Targets()
    view: View = "comparison"
    axes: tuple[str, ...] = ()  # of a sweep: settings, the first one on the horizontal axis
    published: Published | None = None


class RunSpec(NamedTuple):
    """Everything that determines a run."""

    task: TaskSpec
    label: str
    optimizer: str
    settings: Mapping[str, Any]
    epochs: int
    schedule: Schedule
    seed: int
    search: bool  # then the test set is not used

    @property
    def key(self) -> str:
        """A readable file name, different for every two runs that differ in anything above."""
        content = json.dumps([self.task, *self[1:]], sort_keys=True, default=dict)
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        kind = "search" if self.search else f"seed{self.seed}"
        slug = re.sub(r"[^\w.+=-]+", "-", self.label).strip("-")
        rate = self.settings.get("learning_rate", 0)
        return f"{slug}_lr{rate:g}_{self.epochs}ep_{kind}_{digest}"
