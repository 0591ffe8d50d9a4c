"""The paper's experiments: they are complete, and `benchmarks.paper` runs what is left of one."""

import jax
import pytest

from benchmarks import experiments, paper
from benchmarks.errors import UsageError
from benchmarks.optimizers.recipes import divide, make_optimizer
from benchmarks.training import experiment, kfac_jax_trainer
from benchmarks.training.experiment import Entry
from benchmarks.training.halving import candidates
from benchmarks.training.loop import Trainer
from tests.benchmarks.tiny import TINY, only_tiny, records


@pytest.mark.parametrize("name", [name for name in experiments.ORDER if name.startswith("table")])
def test_tables_of_the_paper_have_its_damping(name):
    """Whatever the library's own default: Eq. 3.5 itself."""
    family = [e for e in experiments.load(name)[0].entries if e.optimizer.endswith("fac")]
    assert family
    for entry in family:
        assert entry.fixed["damping_scale"] == 1.0, entry.label
        assert entry.fixed["factor_interval"] == 50


@pytest.mark.parametrize("name", experiments.ORDER)
def test_experiments_are_complete(name, tiny_trainer):
    """It can be made, has different labels, and says how it is run."""
    found, doc = experiments.load(name)
    assert f"python -m benchmarks.paper {name}" in doc
    labels = [entry.label for entry in found.entries]
    assert len(set(labels)) == len(labels)
    if found.published:
        assert set(found.published.accuracy) <= set(labels)
    params, _ = tiny_trainer.task.initial_variables(0)
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
            tx = make_optimizer(entry.optimizer, tiny_trainer.layers, static, traced)
            hyperparams = jax.eval_shape(tx.init, params).hyperparams
            assert set(hyperparams) == set(traced)


# --- the command -----------------------------------------------------------------------------


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
