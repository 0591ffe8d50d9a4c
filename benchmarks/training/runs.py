"""One run that survives being killed: a record when it is finished, a checkpoint until then."""

import contextlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

import tekfac_jax
from benchmarks.errors import UsageError
from benchmarks.optimizers.recipes import divide
from benchmarks.training.experiment import RunSpec
from benchmarks.training.loop import Trains, TrainState
from benchmarks.training.timing import settings as machine

_CHECKPOINT_EVERY = 60.0  # seconds; a kill costs at most this and one epoch
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "kfac-jax")


class OutOfTime(Exception):
    """The time limit has passed; unfinished work is in a checkpoint."""


class Progress(NamedTuple):
    """What a run has recorded so far."""

    curve: list[dict[str, Any]]  # one for each epoch
    step_seconds: list[float]


class Store:
    """Records and checkpoints below a directory, by the key of their run.

    Args:
        directory: created if it is missing.
        checkpoint_every: seconds between checkpoints; they are written after an epoch.

    Raises:
        UsageError: the directory cannot be written to.
    """

    def __init__(self, directory: Path, checkpoint_every: float = _CHECKPOINT_EVERY):
        self.directory, self.checkpoint_every = directory.absolute(), checkpoint_every
        try:
            (self.directory / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot write to {directory} ({error.strerror}): choose another --out"
            ) from error

    def record(self, spec: RunSpec) -> dict[str, Any] | None:
        """The record of a finished run."""
        path = self._path(spec)
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, spec: RunSpec, record: dict[str, Any]) -> None:
        """Writes the record and deletes the checkpoint."""
        write_json(self._path(spec), record)
        shutil.rmtree(self._checkpoint(spec), ignore_errors=True)

    def save(self, spec: RunSpec, state: TrainState, progress: Progress) -> None:
        """Writes a checkpoint; the previous one stays until this one is complete."""
        with self._manager(spec) as manager:
            manager.save(
                len(progress.curve),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.tree.leaves(state)),
                    progress=ocp.args.JsonSave(progress._asdict()),
                ),
            )

    def restore(self, spec: RunSpec, initial: TrainState) -> tuple[TrainState, Progress]:
        """State and progress of the last checkpoint, or of the beginning."""
        if not self._checkpoint(spec).exists():
            return initial, Progress([], [])
        leaves, structure = jax.tree.flatten(initial)
        with self._manager(spec) as manager:
            step = manager.latest_step()
            if step is None:
                return initial, Progress([], [])
            found = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(leaves), progress=ocp.args.JsonRestore()
                ),
            )
        return jax.tree.unflatten(structure, found["state"]), Progress(**found["progress"])

    def _path(self, spec: RunSpec) -> Path:
        return self.directory / "runs" / f"{spec.key}.json"

    def _checkpoint(self, spec: RunSpec) -> Path:
        return self.directory / "checkpoints" / spec.key

    def _manager(self, spec: RunSpec) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._checkpoint(spec), options=options)


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is either complete or absent."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False, default=dict) + "\n")
    unfinished.replace(path)


def train(
    spec: RunSpec,
    store: Store,
    make_trainer: Callable[[], Trains],
    *,
    deadline: float = math.inf,
    on_epoch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Finishes a run, from wherever it was left.

    Args:
        spec: which run.
        store: where its record and its checkpoint are.
        make_trainer: compiles; called only if there is something left to do.
        deadline: value of `time.monotonic` after which to stop.
        on_epoch: called after each epoch, and for those that are already done.

    Returns:
        The record, as in the JSON file; ``train_loss`` is None if the run diverged.

    Raises:
        OutOfTime: the deadline has passed; there is a checkpoint.
    """
    record = store.record(spec)
    if record is not None:
        for _ in range(spec.epochs):
            on_epoch()
        return record
    if time.monotonic() > deadline:
        raise OutOfTime
    trainer, traced = make_trainer(), divide(spec.settings).traced
    state, progress = store.restore(spec, trainer.initial_state(spec.seed, traced))
    for _ in progress.curve:
        on_epoch()
    saved, kept = time.monotonic(), len(progress.curve)
    finite = True
    while finite and len(progress.curve) < spec.epochs:
        late = time.monotonic() > deadline
        new = len(progress.curve) > kept
        if new and (late or time.monotonic() > saved + store.checkpoint_every):
            store.save(spec, state, progress)
            saved, kept = time.monotonic(), len(progress.curve)
        if late:
            raise OutOfTime
        state, finite = _epoch(spec, trainer, state, progress)
        on_epoch()
    record = _record(spec, trainer, state, progress, finite)
    store.finish(spec, record)
    return record


def _epoch(
    spec: RunSpec, trainer: Trains, state: TrainState, progress: Progress
) -> tuple[TrainState, bool]:
    """Adds one more epoch to `progress`; returns the state, and whether the loss is finite."""
    epoch = len(progress.curve) + 1
    state, steps = trainer.train_epoch(
        state, learning_rate=spec.settings["learning_rate"], seed=spec.seed, epoch=epoch,
        epochs=spec.epochs, schedule=spec.schedule,
    )  # fmt: skip
    progress.step_seconds.extend(steps.seconds)
    loss = statistics.fmean(steps.losses)
    if not math.isfinite(loss):
        return state, False
    accuracy = None if spec.search else trainer.task.evaluate(state, "test")[1]
    progress.curve.append(
        {
            "epoch": epoch,
            "train_loss": loss,
            "test_accuracy": accuracy,
            "seconds": sum(progress.step_seconds),
        }
    )
    return state, True


def _versions() -> dict[str, str]:
    """Versions of the packages; beside kfac-jax, tekfac_jax runs from its folder, uninstalled."""
    found = {"tekfac_jax": tekfac_jax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _record(
    spec: RunSpec, trainer: Trains, state: TrainState, progress: Progress, finite: bool
) -> dict[str, Any]:
    loss = trainer.task.evaluate(state, "train")[0] if finite else math.nan
    finite = math.isfinite(loss)
    seconds = progress.step_seconds
    return {
        **spec._asdict(),
        "task": spec.task._asdict(),
        "schedule": spec.schedule._asdict(),
        "settings": dict(spec.settings),
        "diverged": not finite,
        "train_loss": loss if finite else None,  # of the trained network, in evaluation mode
        "curve": progress.curve,
        "failures": _failures(trainer, state),
        "median_step_ms": 1e3 * statistics.median(seconds),
        "mean_step_ms": 1e3 * statistics.fmean(seconds),
        "compile_seconds": trainer.compile_seconds,
        "parameters": trainer.task.num_parameters,
        "versions": _versions(),
        "machine": {**machine(), "load": _load()},
    }


def _load() -> float | None:
    """Load average of the last minute: on a busy machine steps take longer."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _failures(trainer: Trains, state: TrainState) -> int:
    """Number of statistics and decompositions that were not finite, over all layers."""
    if trainer.layers is None:
        return 0
    found = tekfac_jax.diagnostics(state.opt_state)
    return int(sum(value for name, value in found.items() if name.endswith("/failures")))
