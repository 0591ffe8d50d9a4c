"""Runs that survive being killed, and what determines a run."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.training import runs
from benchmarks.training.experiment import RunSpec, TaskSpec
from benchmarks.training.loop import Schedule, Trainer
from tests.benchmarks.tiny import TASK, spec

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records"

TIMES = {"median_step_ms", "mean_step_ms", "machine", "compile_seconds", "seconds"}


def untimed(record):
    """What must be the same however often a run was interrupted."""
    if isinstance(record, dict):
        return {k: untimed(v) for k, v in record.items() if k not in TIMES}
    return [untimed(item) for item in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def whole(tiny_trainer, tmp_path_factory):
    """A run that nothing interrupted."""
    store = runs.Store(tmp_path_factory.mktemp("whole"))
    with jax.numpy_dtype_promotion("standard"):
        return runs.train(spec(), store, lambda: tiny_trainer)


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of orbax
@pytest.mark.parametrize("killed", [[1], [2], [1, 2]])
def test_killed_run_continues_as_if_nothing_had_been(tmp_path, tiny_trainer, whole, killed):
    store = runs.Store(tmp_path, checkpoint_every=0.0)
    for epoch in killed:
        seen = itertools.count(1)

        def kill(seen=seen, epoch=epoch):
            if next(seen) == epoch + 1:  # before the checkpoint of this epoch
                raise Killed

        with pytest.raises(Killed):
            runs.train(spec(), store, lambda: tiny_trainer, on_epoch=kill)
        assert store.record(spec()) is None
    record = runs.train(spec(), store, lambda: tiny_trainer)
    assert untimed(record) == untimed(whole)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert record["curve"][-1]["seconds"] > record["curve"][0]["seconds"] > 0


KILLED = """
import sys, threading
from pathlib import Path
from benchmarks import paper
from benchmarks.training import runs
from tests.properties import resuming
from tests.benchmarks import tiny

store = runs.Store(Path(sys.argv[1]), checkpoint_every=0.0)
saved, save = [], store.save

def killed_at_the_second(spec, *args):
    saved.append(spec)
    if len(saved) == 2:
        folder = store._checkpoint(spec)
        threading.Thread(target=resuming.kill_in_the_middle_of_a_save, args=(folder,)).start()
    save(spec, *args)

store.save = killed_at_the_second
task = paper.make_task(tiny.TASK, None)
runs.train(tiny.spec(), store, lambda: tiny.make_trainer(task))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of orbax
def test_run_killed_in_the_middle_of_a_save_continues(tmp_path, tiny_trainer, whole, monkeypatch):
    """By SIGKILL, which nothing can catch: one checkpoint is whole, another is not."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert {"1"} < {path.name for path in folder.iterdir()}
    trained, epoch = [], runs._epoch
    monkeypatch.setattr(runs, "_epoch", lambda *args: trained.append(1) or epoch(*args))
    record = runs.train(spec(), runs.Store(tmp_path), lambda: tiny_trainer)
    assert untimed(record) == untimed(whole)
    assert len(trained) == spec().epochs - 1  # from the first checkpoint
    assert not list((tmp_path / "checkpoints").iterdir())


def slow(now, trainer):
    """Compiles for a second."""

    def make():
        now[0] += 1.0
        return trainer

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of orbax
def test_time_that_is_over_leaves_a_checkpoint(tmp_path, tiny_trainer, whole, monkeypatch):
    store = runs.Store(tmp_path)
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    epochs = []

    def on_epoch():
        epochs.append(None)
        now[0] += 1.0

    with pytest.raises(runs.OutOfTime):
        runs.train(spec(), store, lambda: tiny_trainer, deadline=1.5, on_epoch=on_epoch)
    assert len(epochs) == 2
    make = slow(now, tiny_trainer)
    with pytest.raises(runs.OutOfTime):  # no time for an epoch more
        runs.train(spec(), store, make, deadline=now[0] + 0.5, on_epoch=on_epoch)
    epochs.clear()
    record = runs.train(spec(), store, lambda: tiny_trainer, on_epoch=on_epoch)
    assert len(epochs) == 3
    assert untimed(record) == untimed(whole)


def test_finished_run_is_not_repeated(tmp_path, tiny_trainer, whole):
    store = runs.Store(tmp_path)
    store.finish(spec(), whole)
    epochs = []
    again = runs.train(spec(), store, pytest.fail, on_epoch=lambda: epochs.append(None))
    assert again == json.loads(json.dumps(whole, default=dict))
    assert len(epochs) == 3


def test_divergence_is_recorded(tmp_path, tiny_task):
    store = runs.Store(tmp_path)
    wild = spec(optimizer="sgd", settings={"learning_rate": 1e30})
    record = runs.train(wild, store, lambda: Trainer(tiny_task, "sgd", {}))
    assert record["diverged"]
    assert record["train_loss"] is None
    assert runs.train(wild, store, pytest.fail) == store.record(wild)


def test_another_run_has_another_key():
    specs = [
        spec(),
        spec(seed=1),
        spec(search=True),
        spec(epochs=4),
        spec(schedule=Schedule(2)),
        spec(settings={**spec().settings, "damping": 1e-3}),
        spec(task=TASK._replace(augment=True)),
    ]
    assert len({s.key for s in specs}) == len(specs)
    assert spec().key == spec(settings=dict(reversed(list(spec().settings.items())))).key


SAVED = sorted(path.parent for path in RECORDS.glob("*/experiment.json"))


@pytest.mark.parametrize("directory", SAVED, ids=lambda directory: directory.name)
def test_saved_records_are_found_again(directory):
    """A run whose key has changed would be trained again."""
    store = runs.Store(directory)
    paths = sorted((directory / "runs").glob("*.json"))
    assert paths
    for path in paths:
        saved = json.loads(path.read_text())
        task, schedule = TaskSpec(**saved["task"]), Schedule(**saved["schedule"])
        fields = {name: saved[name] for name in RunSpec._fields}
        run = RunSpec(**fields)._replace(task=task, schedule=schedule)
        assert store.record(run) == saved, path.name


def test_what_is_random_depends_on_seed_and_step(tiny_trainer):
    """Augmentation: the same parameters and batch, another step or seed, another loss."""
    batch = next(tiny_trainer.task.batches(0, 1))

    def loss(seed, step):
        state = tiny_trainer.initial_state(0)
        state = state.replace(seed=np.int32(seed), step=np.int32(step))
        return float(tiny_trainer.compiled(state, *batch, np.float32(0))[1])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


@pytest.mark.slow
def test_settings_of_one_step_are_those_of_its_own_compilation(tiny_task):
    """A number that stands in the state acts like one that is compiled in."""
    batch = next(tiny_task.batches(0, 1))
    settings = {"damping": 1e-3, "trace_floor": 0.01, "kl_clip": 1e-3, "momentum": 0.9}
    others = {"damping": 1e-1, "trace_floor": 1.0, "kl_clip": 1e-5, "momentum": 0.5}
    trainer = Trainer(tiny_task, "tekfac", settings)

    def after(trainer, **values):
        state = trainer.initial_state(0, values)
        for _ in range(2):
            state, _ = trainer.compiled(state, *batch, np.float32(0.1))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])

    changed = after(trainer, **others)
    np.testing.assert_allclose(changed, after(Trainer(tiny_task, "tekfac", others)), rtol=1e-5)
    for name, value in others.items():
        if name != "trace_floor":  # no trace damping here
            assert not np.allclose(after(trainer, **{name: value}), after(trainer), rtol=1e-5)
