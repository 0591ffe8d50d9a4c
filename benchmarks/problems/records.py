"""What is kept of a run: a JSON file that is either complete or absent."""

import functools
import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tekfac_jax
from benchmarks.errors import DataError, UsageError
from benchmarks.problems.training import Stepper, Trained
from benchmarks.training.runs import write_json
from benchmarks.training.timing import settings as machine

POINTS = 100  # of a curve that is kept
_LAST = 0.05  # share of the steps whose mean is the final loss
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


class RunKey(NamedTuple):
    """Everything that determines a run."""

    workload: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    options: Mapping[str, Any] = {}

    @property
    def file(self) -> str:
        """A readable file name, different for every two keys."""
        name = f"{self.workload}_{self.optimizer}_{self.rate!r}_seed{self.seed}_{self.steps}steps"
        if not self.options:
            return f"{name}.json"
        content = json.dumps(self.options, sort_keys=True)
        return f"{name}_{hashlib.sha256(content.encode()).hexdigest()[:10]}.json"


class Record(NamedTuple):
    """A finished run. Numbers that are not finite are None."""

    workload: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    options: dict[str, Any]
    losses: list[float | None]  # means over at most `POINTS` equal parts of the run
    start: float  # loss of the first step
    final: float | None  # mean over the last 5 % of the steps
    full_loss: float | None  # on the whole training set, where that is measured
    validation: float | None
    metric: str
    higher_is_better: bool
    lost: bool  # not finite, or the final loss above the start
    taken: int  # steps until the end, or until the loss was not finite
    median_step_ms: float
    mean_step_ms: float  # with refreshes of the curvature
    compile_seconds: float
    parameters: int
    versions: dict[str, str]
    library: str  # fingerprint of the sources of tekfac_jax
    machine: dict[str, Any]


def describe(key: RunKey, stepper: Stepper, run: Trained) -> Record:
    """The record of a finished run; measures the validation metric."""
    workload, state = stepper.workload, run.state
    finished = math.isfinite(run.losses[-1])
    final = smoothed_final(run.losses) if finished else math.nan
    full = validation = math.nan
    if finished:
        validation = workload.validate(state.params, state.model_state)
        if workload.full_loss is not None:
            full = workload.full_loss(state.params, state.model_state)
    return Record(
        key.workload, key.optimizer, key.rate, key.seed, key.steps, dict(key.options),
        losses=[_finite(x) for x in thinned(run.losses)],
        start=run.losses[0], final=_finite(final), full_loss=_finite(full),
        validation=_finite(validation), metric=workload.metric,
        higher_is_better=workload.higher_is_better,
        lost=not (math.isfinite(final) and final <= run.losses[0]),
        taken=len(run.losses),
        median_step_ms=1e3 * statistics.median(run.seconds),
        mean_step_ms=1e3 * statistics.fmean(run.seconds),
        compile_seconds=stepper.compile_seconds, parameters=stepper.parameters,
        versions={package: version(package) for package in _PACKAGES},
        library=fingerprint(), machine={**machine(), "load": _load()},
    )  # fmt: skip


def smoothed_final(losses: Sequence[float]) -> float:
    """Mean over the last 5 % of the steps."""
    return statistics.fmean(losses[-max(1, round(_LAST * len(losses))) :])


def thinned(losses: Sequence[float]) -> list[float]:
    """Means over at most `POINTS` parts of equal length, to within one step."""
    return [float(np.mean(p)) for p in np.array_split(losses, min(POINTS, len(losses)))]


@functools.cache
def fingerprint() -> str:
    """Of the library's sources: it tells runs of two states of the library apart."""
    sources = Path(tekfac_jax.__file__).parent
    found = hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        found.update(path.relative_to(sources).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:10]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _load() -> float | None:
    """Load average of the last minute: on a busy machine steps take longer."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Records:
    """The records in a directory.

    Args:
        directory: where `runs` is, or is made when something is written.
    """

    def __init__(self, directory: Path):
        self.runs = directory / "runs"

    def has(self, key: RunKey) -> bool:
        """Whether this run is finished."""
        return (self.runs / key.file).exists()

    def write(self, key: RunKey, record: Record) -> None:
        """Writes a record.

        Raises:
            UsageError: the directory cannot be written to.
        """
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            write_json(self.runs / key.file, record._asdict())
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.runs} ({error.strerror}): choose another --out"
            ) from error

    def read(self) -> list[Record]:
        """All records, in the order of their file names.

        Raises:
            DataError: a file that is no record.
        """
        return [_read(path) for path in sorted(self.runs.glob("*.json"))]


def _read(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no record of a run ({error}): delete it") from error
