"""The paper's experiments: search, runs that survive being killed, and the report."""

import contextlib
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import tekfac_jax
from benchmarks import experiments, paper, report
from benchmarks.errors import UsageError
from benchmarks.optimizers.recipes import divide, make_optimizer
from benchmarks.reporting import results
from benchmarks.training import experiment, kfac_jax_trainer, runs
from benchmarks.training.experiment import Entry, Experiment, RunSpec, Targets, TaskSpec
from benchmarks.training.halving import Rung, candidates, grid_size, search
from benchmarks.training.loop import COSINE, Schedule, Task, Trainer
from tests.test_errors import simple_case

TASK = TaskSpec("digits", "cnn", subset=320, width=4, batch_size=64)
TINY = Experiment(
    title="tiny",
    task=TASK,
    entries=(
        Entry("TEKFAC", "tekfac", {"learning_rate": (0.01, 0.03, 0.1), "damping": (1e-3, 1e-2)}),
        Entry("SGDM", "sgd", {"learning_rate": (0.03, 0.1, 0.3)}),
        Entry("fast", "sgd", {}, {"learning_rate": 1e30}),
    ),
    epochs=2,
    seeds=(0, 1),
    rungs=(Rung(1, 2), Rung(2, 1)),
    targets=Targets(train_loss=2.3, test_accuracy=0.3),
)
TIMES = {"median_step_ms", "mean_step_ms", "machine", "compile_seconds", "seconds"}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Users' setting: optax.adam and flax's pooling rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def only_tiny(tiny=TINY):
    """The experiment above in the place of those of the paper."""
    module = types.SimpleNamespace(EXPERIMENT=tiny, __doc__="Tiny.\n\nNothing else.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "names", lambda: ["tiny"])
        patch.setitem(sys.modules, "benchmarks.experiments.tiny", module)
        yield


@pytest.fixture
def tiny():
    with only_tiny():
        yield


@pytest.fixture(scope="module")
def task():
    return paper.make_task(TASK, None)


def noise(key, images):
    return images + 0.1 * jax.random.normal(key, images.shape)


def make_trainer(task):
    """Augmentation, sampled labels and everything that is random in a step."""
    noisy = Task(task.dataset, task.model, task.batch_size, noise)
    settings = {"damping": 1e-3, "factor_interval": 2, "fisher": "sampled"}
    return Trainer(noisy, "tekfac", settings)


@pytest.fixture(scope="module")
def trainer(task):
    return make_trainer(task)


def spec(**changed):
    settings = {"learning_rate": 0.03, "damping": 1e-2, "factor_interval": 2, "fisher": "sampled"}
    return RunSpec(TASK, "TEKFAC", "tekfac", settings, 3, COSINE, 0, False)._replace(**changed)


def untimed(record):
    """What must be the same however often a run was interrupted."""
    if isinstance(record, dict):
        return {k: untimed(v) for k, v in record.items() if k not in TIMES}
    return [untimed(item) for item in record] if isinstance(record, list) else record


# --- search ----------------------------------------------------------------------------------


def test_sampled_grid_is_even():
    grid = {"learning_rate": tuple(range(10)), "trace_floor": tuple(range(7))}
    found = candidates(grid, 20)
    assert len(found) == 20
    assert len({tuple(c.values()) for c in found}) == 20
    assert found == candidates(grid, 20)
    for name, values in grid.items():
        counts = np.bincount([c[name] for c in found], minlength=len(values))
        assert counts.max() - counts.min() <= 1, name
    assert len(candidates(grid, 69)) == len({tuple(c.values()) for c in candidates(grid, 69)}) == 69
    assert candidates({"a": (1, 2)}, 5) == [{"a": 1}, {"a": 2}]
    assert candidates({}, 5) == [{}]
    assert grid_size(grid) == 70


def test_halving_keeps_the_best_and_costs_what_it_says():
    calls = []

    def score(candidate, epochs):
        calls.append((candidate["x"], epochs))
        # In short runs 4 looks best, in long ones 3; 5 diverges.
        best = 4 if epochs == 1 else 3
        return math.inf if candidate["x"] == 5 else abs(candidate["x"] - best)

    found = candidates({"x": tuple(range(6))}, 6)
    assert search(found, (Rung(1, 3), Rung(4, 1)), score) == {"x": 3}
    assert calls == [(x, 1) for x in range(6)] + [(x, 4) for x in (4, 3, 2)]
    calls.clear()
    assert search([{"x": 1}], (Rung(1, 1),), score) == {"x": 1}
    assert not calls


# --- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """A run that nothing interrupted."""
    store = runs.Store(tmp_path_factory.mktemp("whole"))
    with jax.numpy_dtype_promotion("standard"):
        return runs.train(spec(), store, lambda: trainer)


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of orbax
@pytest.mark.parametrize("killed", [[1], [2], [1, 2]])
def test_killed_run_continues_as_if_nothing_had_been(tmp_path, trainer, whole, killed):
    store = runs.Store(tmp_path, checkpoint_every=0.0)
    for epoch in killed:
        seen = itertools.count(1)

        def kill(seen=seen, epoch=epoch):
            if next(seen) == epoch + 1:  # before the checkpoint of this epoch
                raise Killed

        with pytest.raises(Killed):
            runs.train(spec(), store, lambda: trainer, on_epoch=kill)
        assert store.record(spec()) is None
    record = runs.train(spec(), store, lambda: trainer)
    assert untimed(record) == untimed(whole)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert record["curve"][-1]["seconds"] > record["curve"][0]["seconds"] > 0


KILLED = """
import sys, threading
from pathlib import Path
from tests import resuming
from tests.benchmarks import test_paper

store = test_paper.runs.Store(Path(sys.argv[1]), checkpoint_every=0.0)
saved, save = [], store.save

def killed_at_the_second(spec, *args):
    saved.append(spec)
    if len(saved) == 2:
        folder = store._checkpoint(spec)
        threading.Thread(target=resuming.kill_in_the_middle_of_a_save, args=(folder,)).start()
    save(spec, *args)

store.save = killed_at_the_second
task = test_paper.paper.make_task(test_paper.TASK, None)
test_paper.runs.train(test_paper.spec(), store, lambda: test_paper.make_trainer(task))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of orbax
def test_run_killed_in_the_middle_of_a_save_continues(tmp_path, trainer, whole, monkeypatch):
    """By SIGKILL, which nothing can catch: one checkpoint is whole, another is not."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert {"1"} < {path.name for path in folder.iterdir()}
    trained, epoch = [], runs._epoch
    monkeypatch.setattr(runs, "_epoch", lambda *args: trained.append(1) or epoch(*args))
    record = runs.train(spec(), runs.Store(tmp_path), lambda: trainer)
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
def test_time_that_is_over_leaves_a_checkpoint(tmp_path, trainer, whole, monkeypatch):
    store = runs.Store(tmp_path)
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    epochs = []

    def on_epoch():
        epochs.append(None)
        now[0] += 1.0

    with pytest.raises(runs.OutOfTime):
        runs.train(spec(), store, lambda: trainer, deadline=1.5, on_epoch=on_epoch)
    assert len(epochs) == 2
    make = slow(now, trainer)
    with pytest.raises(runs.OutOfTime):  # no time for an epoch more
        runs.train(spec(), store, make, deadline=now[0] + 0.5, on_epoch=on_epoch)
    epochs.clear()
    record = runs.train(spec(), store, lambda: trainer, on_epoch=on_epoch)
    assert len(epochs) == 3
    assert untimed(record) == untimed(whole)


def test_finished_run_is_not_repeated(tmp_path, trainer, whole):
    store = runs.Store(tmp_path)
    store.finish(spec(), whole)
    epochs = []
    again = runs.train(spec(), store, pytest.fail, on_epoch=lambda: epochs.append(None))
    assert again == json.loads(json.dumps(whole, default=dict))
    assert len(epochs) == 3


def test_divergence_is_recorded(tmp_path, task):
    store = runs.Store(tmp_path)
    wild = spec(optimizer="sgd", settings={"learning_rate": 1e30})
    record = runs.train(wild, store, lambda: Trainer(task, "sgd", {}))
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
    assert spec().key == spec(settings=dict(reversed(spec().settings.items()))).key


def test_what_is_random_depends_on_seed_and_step(trainer):
    """Augmentation: the same parameters and batch, another step or seed, another loss."""
    batch = next(trainer.task.batches(0, 1))

    def loss(seed, step):
        state = trainer.initial_state(0)
        state = state.replace(seed=np.int32(seed), step=np.int32(step))
        return float(trainer.compiled(state, *batch, np.float32(0))[1])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


@pytest.mark.slow
def test_settings_of_one_step_are_those_of_its_own_compilation(task):
    """A number that stands in the state acts like one that is compiled in."""
    batch = next(task.batches(0, 1))
    settings = {"damping": 1e-3, "trace_floor": 0.01, "kl_clip": 1e-3, "momentum": 0.9}
    others = {"damping": 1e-1, "trace_floor": 1.0, "kl_clip": 1e-5, "momentum": 0.5}
    trainer = Trainer(task, "tekfac", settings)

    def after(trainer, **values):
        state = trainer.initial_state(0, values)
        for _ in range(2):
            state, _ = trainer.compiled(state, *batch, np.float32(0.1))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])

    changed = after(trainer, **others)
    np.testing.assert_allclose(changed, after(Trainer(task, "tekfac", others)), rtol=1e-5)
    for name, value in others.items():
        if name != "trace_floor":  # no trace damping here
            assert not np.allclose(after(trainer, **{name: value}), after(trainer), rtol=1e-5)


def test_settings_are_divided():
    settings = {"learning_rate": 1, "damping": "trace", "momentum": None, "factor_interval": 5}
    static, traced = divide(settings)
    assert traced == {"learning_rate": 1.0}
    assert static == {"damping": "trace", "momentum": None, "factor_interval": 5}
    with pytest.raises(UsageError, match="sgd has no setting 'damping': choose from"):
        make_optimizer("sgd", None, {"damping": 1.0})


@pytest.mark.slow
def test_theta_stays_as_it_is_without_transport():
    loss, params, x, layers = simple_case()
    intervals = {"factor_interval": 1, "eigenbasis_interval": 2, "rescaling_interval": 3}
    _, grads, stats = tekfac_jax.value_grad_and_stats(loss, layers)(params, x)
    thetas = {}
    for name in ("tekfac", "tekfac-without-transport"):
        tx = make_optimizer(name, layers, intervals, {"learning_rate": 0.1})
        state, seen = tx.init(params), []
        for step in range(3):  # at the last one the basis changes, and Θ is not measured
            scaled = jax.tree.map(lambda x, step=step: x * (1 + step), stats.layers)
            _, state = tx.update(grads, state, params, stats=stats._replace(layers=scaled))
            curvature = tekfac_jax.curvature(state)["Dense_0"]
            seen.append((curvature.theta, curvature.q_phi))
        thetas[name] = seen
    (before, q_before), (moved, q_moved) = thetas["tekfac"][1:]
    assert not np.allclose(q_before, q_moved)
    assert not np.allclose(before, moved)
    np.testing.assert_allclose(jnp.sum(before), jnp.sum(moved), rtol=1e-5)
    (same_before, _), (kept, q_kept) = thetas["tekfac-without-transport"][1:]
    np.testing.assert_array_equal(before, same_before)
    np.testing.assert_array_equal(q_moved, q_kept)
    np.testing.assert_array_equal(before, kept)


def test_step_decay():
    schedule = Schedule(decay_every=40, factor=0.1)
    assert [schedule.rate(1.0, done, 100) for done in (0, 39.99, 40, 80)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )


@pytest.mark.parametrize("name", [name for name in experiments.ORDER if name.startswith("table")])
def test_tables_of_the_paper_have_its_damping(name):
    """Whatever the library's own default: Eq. 3.5 itself."""
    family = [e for e in experiments.load(name)[0].entries if e.optimizer.endswith("fac")]
    assert family
    for entry in family:
        assert entry.fixed["damping_scale"] == 1.0, entry.label
        assert entry.fixed["factor_interval"] == 50


@pytest.mark.parametrize("name", experiments.ORDER)
def test_experiments_are_complete(name, trainer):
    """It can be made, has different labels, and says how it is run."""
    found, doc = experiments.load(name)
    assert f"python -m benchmarks.paper {name}" in doc
    labels = [entry.label for entry in found.entries]
    assert len(set(labels)) == len(labels)
    if found.published:
        assert set(found.published.accuracy) <= set(labels)
    params, _ = trainer.task.initial_variables(0)
    made = set()  # most entries of a sweep differ in numbers only
    for entry in found.entries:
        settings = {**entry.fixed, **candidates(entry.grid, 1)[0]}
        assert settings["learning_rate"] > 0
        static, traced = divide(settings)
        fisher = static.pop("fisher", "empirical")
        assert fisher in ("empirical", "sampled")
        if entry.optimizer == kfac_jax_trainer.NAME:
            kfac_jax_trainer.check_settings(settings)
        elif (kind := repr((entry.optimizer, static, sorted(traced)))) not in made:
            made.add(kind)
            tx = make_optimizer(entry.optimizer, trainer.layers, static, traced)
            hyperparams = jax.eval_shape(tx.init, params).hyperparams
            assert set(hyperparams) == set(traced)


# --- the whole -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Everything, once."""
    directory = tmp_path_factory.mktemp("out")
    with only_tiny(), jax.numpy_dtype_promotion("standard"):
        paper.main(["tiny", "--out", str(directory)])
    return directory


def records(directory):
    return [json.loads(path.read_text()) for path in (directory / "runs").glob("*.json")]


@pytest.mark.slow
def test_every_optimizer_has_the_same_budget(out):
    found = records(out)
    for label in ("TEKFAC", "SGDM"):
        tried = [r for r in found if r["label"] == label and r["search"]]
        # Three trials of one epoch, two of two; of TEKFAC's grid of six a sample of three.
        assert sorted(r["epochs"] for r in tried) == [1, 1, 1, 2, 2]
        assert len({r["settings"]["learning_rate"] for r in tried}) == 3
        assert all(r["seed"] == experiment.SEARCH_SEED for r in tried)
        assert all(epoch["test_accuracy"] is None for r in tried for epoch in r["curve"])
        best = min((r for r in tried if r["epochs"] == 2), key=lambda r: r["train_loss"])
        final = [r for r in found if r["label"] == label and not r["search"]]
        assert sorted(r["seed"] for r in final) == [0, 1]
        assert all(r["settings"] == best["settings"] for r in final)
        assert all(r["curve"][-1]["test_accuracy"] > 0.15 for r in final)
    fast = [r for r in found if r["label"] == "fast"]
    assert len(fast) == 2
    assert all(r["diverged"] for r in fast)


def test_same_command_has_nothing_left_to_do(tiny, out, monkeypatch, capsys):
    monkeypatch.setattr(paper, "Trainer", pytest.fail)
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    paper.main(["tiny", "--out", str(out)])
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == before
    assert "seed" not in capsys.readouterr().out


@pytest.mark.slow
def test_grid_of_numbers_is_one_compilation(tiny, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(paper, "Trainer", lambda *a: made.append(a) or Trainer(*a))
    paper.main(["tiny", "--out", str(tmp_path), "--only", "SGDM,fast"])
    assert len(made) == 1


def test_time_is_kept(tiny, tmp_path, capsys):
    paper.main(["tiny", "--out", str(tmp_path), "--minutes", "1e-9"])
    assert "minutes are over" in capsys.readouterr().out
    assert records(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing", "unknown experiment 'nothing': choose from tiny"),
        ("tiny --only Adam", "unknown label in --only 'Adam': choose from TEKFAC, SGDM, fast"),
        ("tiny --minutes 0", "--minutes must be positive, got 0"),
    ],
)
def test_refused_in_one_sentence(tiny, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        paper.main([*arguments.split(), "--out", str(tmp_path)])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


class StandIn:
    """In the place of kfac-jax, which has an environment of its own."""

    def __init__(self, task, settings):
        kfac_jax_trainer.check_settings(settings)
        self.inner = Trainer(task, "sgd", {"learning_rate": 0.1})

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_kfac_jax_where_it_is_installed_and_where_it_is_not(tmp_path, monkeypatch, capsys):
    entries = (
        Entry("SGDM", "sgd", {}, {"learning_rate": 0.1}),
        Entry("kfac-jax", "kfac-jax", {}, {"learning_rate": 0.1, "inverse_update_period": 50}),
    )
    small = TINY._replace(entries=entries, epochs=1, seeds=(0,))
    with only_tiny(small):
        monkeypatch.setattr(kfac_jax_trainer, "is_installed", lambda: False)
        paper.main(["tiny", "--out", str(tmp_path)])
        assert (
            "left out: kfac-jax, which needs an environment of its own" in capsys.readouterr().out
        )
        assert [r["label"] for r in records(tmp_path)] == ["SGDM"]
        with pytest.raises(SystemExit):
            paper.main(["tiny", "--out", str(tmp_path), "--only", "kfac-jax"])
        assert "kfac-jax, which needs an environment" in capsys.readouterr().err

        monkeypatch.setattr(kfac_jax_trainer, "is_installed", lambda: True)
        monkeypatch.setattr(kfac_jax_trainer, "KfacJaxTrainer", StandIn)
        paper.main(["tiny", "--out", str(tmp_path)])
        assert sorted(r["label"] for r in records(tmp_path)) == ["SGDM", "kfac-jax"]
    with pytest.raises(UsageError, match="kfac-jax has no setting 'damping_scale': choose from"):
        kfac_jax_trainer.check_settings({"damping_scale": 1.0})


# --- the report ------------------------------------------------------------------------------


def written(out, directory, **changed):
    """A copy of the experiment's JSON with another description, and its report."""
    shutil.copytree(out / "runs", directory / "x" / "runs")
    return written_over(out, directory, **changed)


def written_over(out, directory, **changed):
    description = json.loads((out / "experiment.json").read_text()) | changed
    (directory / "x" / "experiment.json").write_text(json.dumps(description))
    report.main([str(directory)])
    return (directory / "report.md").read_text()


def row(text, label):
    """Cells of a line of the first table."""
    (line, *_) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def is_drawn(path):
    with Image.open(path) as image:
        return image.format == "PNG" and image.size[0] > 100


def test_comparison_is_reported(out, tmp_path):
    published = {"source": "a book", "accuracy": {"SGDM": (91.5, 0.25)}}
    text = written(out, tmp_path, published=published)
    final = [r for r in records(out) if r["label"] == "SGDM" and not r["search"]]
    accuracies = [100 * r["curve"][-1]["test_accuracy"] for r in final]
    cells = row(text, "SGDM")
    assert cells[1] == f"learning_rate {final[0]['settings']['learning_rate']:g}"
    assert cells[3] == f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
    assert cells[4] == "91.50 ± 0.25"
    first = [next((e["epoch"] for e in r["curve"] if e["train_loss"] <= 2.3), None) for r in final]
    assert None not in first
    assert float(cells[5].split(" ± ")[0]) == pytest.approx(np.mean(first), abs=0.051)
    assert row(text, "TEKFAC")[4] == "–"
    assert "fast: 2 of 2 runs diverged" in text
    assert "a fixed, even sample of 3 of a grid of 6: TEKFAC" in text
    assert "all of a grid of 3: SGDM" in text
    assert is_drawn(tmp_path / "tiny.png")


def test_unfinished_experiment_is_reported(out, tmp_path):
    shutil.copytree(out / "runs", tmp_path / "x" / "runs")
    for path in (tmp_path / "x" / "runs").glob("*seed1*"):
        path.unlink()
    text = written_over(out, tmp_path)
    assert "not finished: TEKFAC, SGDM, fast" in text
    assert "±" not in row(text, "SGDM")[3]
    shutil.rmtree(tmp_path / "x" / "runs")
    text = written_over(out, tmp_path, winners={})
    assert row(text, "SGDM")[1:4] == ["–", "–", "–"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{"settings": {"learning_rate": 7.0}}, {"epochs": 3}, {"seed": 9}, {"task": {}}],
    ids=lambda changed: next(iter(changed)),
)
def test_runs_of_another_experiment_do_not_count(out, tmp_path, changed):
    """What an experiment that has been changed since has left in its directory."""
    shutil.copytree(out / "runs", tmp_path / "x" / "runs")
    expected = written_over(out, tmp_path)
    for index, record in enumerate(records(out)):
        path = tmp_path / "x" / "runs" / f"old{index}.json"
        path.write_text(json.dumps(record | changed | {"search": False}))
    assert written_over(out, tmp_path) == expected


def test_ablation_is_reported(out, tmp_path):
    text = written(out, tmp_path, view="ablation")
    means = {
        label: np.mean(
            [
                100 * r["curve"][-1]["test_accuracy"]
                for r in records(out)
                if r["label"] == label and not r["search"]
            ]
        )
        for label in ("TEKFAC", "SGDM")
    }
    assert row(text, "TEKFAC")[4] == "+0.00"
    assert row(text, "SGDM")[4] == f"{means['SGDM'] - means['TEKFAC']:+.2f}"
    assert row(text, "fast")[4] == "–"
    assert is_drawn(tmp_path / "tiny.png")


def test_sweep_is_reported(out, tmp_path):
    text = written(out, tmp_path, view="sweep", axes=["learning_rate", "damping"])
    tekfac = next(r for r in records(out) if r["label"] == "TEKFAC" and not r["search"])
    cells = row(text, f"tekfac, damping {tekfac['settings']['damping']:g}")
    assert sum("±" in cell for cell in cells[1:-1]) == 1
    assert cells[-1] == "0.0"
    # Two entries of SGD: their rates stand in one row, and one of them diverged.
    assert sum(cell != "–" for cell in row(text, "sgd")[1:-1]) == 1
    assert is_drawn(tmp_path / "tiny.png")


def test_overview_of_published_figures(out, tmp_path):
    published = {"source": "a book", "accuracy": {"SGDM": (91.5, 0.25), "fast": (1, 0)}}
    for name in ("one", "two"):
        shutil.copytree(out, tmp_path / name)
        description = json.loads((out / "experiment.json").read_text())
        description |= {"name": name, "title": name, "published": published}
        (tmp_path / name / "experiment.json").write_text(json.dumps(description))
    report.main([str(tmp_path)])
    cells = row((tmp_path / "report.md").read_text(), "two")
    assert cells[1].endswith("(91.50 ± 0.25)")
    assert cells[2] == "– (1.00 ± 0.00)"


def test_nothing_to_report_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path)])
    assert end.value.code == 2
    assert "no experiment.json in" in capsys.readouterr().err


def test_share_of_anothers_epochs():
    def outcome(*curves):
        found = [
            {
                "seed": seed,
                "curve": [
                    {"epoch": k, "seconds": 2.0 * k, "train_loss": x}
                    for k, x in enumerate(curve, 1)
                ],
            }
            for seed, curve in enumerate(curves)
        ]
        return results.Outcome("some", "sgd", {}, {}, found, 0)

    fast, slow = outcome([3, 1, 0.5, 0.4], [2, 2, 2, 2]), outcome([4, 3, 2, 1], [4, 1, 2, 3])
    assert fast.share_of(slow, "epoch")[0] == 2 / 4
    assert math.isnan(fast.share_of(slow, "seconds")[1])
    assert slow.share_of(fast, "epoch")[1] == 2 / 1
    assert fast.share_of(outcome([4, 3, 2, 1]), "seconds") == [4.0 / 8.0]


def test_plateau():
    rates = [1e-3, 1e-2, 1e-1, 1.0]
    assert results.plateau(rates, [50, 90, 90, 50]) == pytest.approx(1 + 2 / 40)
    assert results.plateau(rates, [90, 89.5, 80, 89.5]) == pytest.approx(1 + 0.5 / 9.5)
    assert results.plateau(rates, [10, 90, math.nan, 90]) == pytest.approx(1 / 80 + 1 / 90)
    assert results.plateau([0.1], [90]) == 0
    assert math.isnan(results.plateau(rates, [math.nan] * 4))
