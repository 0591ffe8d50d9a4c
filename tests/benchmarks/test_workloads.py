"""The workloads: each one trains, all optimizers get the same runs, the command resumes."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import workloads
from benchmarks.data.sets import Dataset
from benchmarks.data.text import read_chapters
from benchmarks.optimizers.rates import OWN_RATES
from benchmarks.optimizers.recipes import OPTIMIZERS
from benchmarks.problems import images
from benchmarks.problems.pixels import divergences
from benchmarks.problems.plan import Plan
from benchmarks.problems.records import RunKey
from benchmarks.problems.table import PROBLEMS, make_workload, scaled_steps
from benchmarks.problems.tables import pixels
from benchmarks.problems.texts import masked
from benchmarks.problems.training import Stepper
from benchmarks.problems.views import contrast
from benchmarks.workloads import main

QUICK = ("diabetes", "autoencoder", "deep-sets")
TINY = 2 / 400  # of the steps: 2


@pytest.fixture
def stand_in(monkeypatch):
    """Random images in the place of CIFAR."""

    def cifar(name, data):
        rng = np.random.default_rng(0)
        pictures = rng.normal(size=(96, 32, 32, 3)).astype(np.float32)
        labels = rng.integers(10, size=96).astype(np.int32)
        return Dataset(name, pictures, labels, pictures[:8], labels[:8], 10)

    monkeypatch.setattr(images, "_cifar", cifar)


# --- the workloads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROBLEMS],
)
def test_every_workload_trains_with_adam_and_tekfac(name, stand_in):
    workload = make_workload(name, None, TINY)
    losses = {}
    for optimizer in ("adam", "tekfac"):
        stepper = Stepper(workload, optimizer, {})
        before = stepper.initial_state(0)
        run = stepper.train(1e-3, seed=0)
        losses[optimizer] = run.losses
        assert len(run.losses) == len(run.seconds) == workload.steps == 2
        assert all(0 < loss < math.inf for loss in run.losses)
        assert math.isfinite(workload.validate(run.state.params, run.state.model_state))
        if workload.full_loss is not None:
            assert 0 < workload.full_loss(run.state.params, run.state.model_state) < math.inf
        for old, new in zip(*map(jax.tree.leaves, (before, run.state)), strict=True):
            assert old.shape == new.shape
            assert old.dtype == new.dtype
        if optimizer == "tekfac":
            assert stepper.layers
    # The same parameters, the same batch and the same noise.
    assert losses["adam"][0] == pytest.approx(losses["tekfac"][0], rel=1e-5)


def first_batches(workload, seed, number=12):
    return list(itertools.islice(workload.batches(seed), number))


@pytest.mark.parametrize("name", PROBLEMS)
def test_batches_depend_on_the_seed_alone(name, stand_in):
    workload = make_workload(name, None)
    batches, again = first_batches(workload, 0), first_batches(workload, 0)
    jax.tree.map(np.testing.assert_array_equal, batches, again)
    jax.tree.map(np.testing.assert_array_equal, batches, first_batches(make_workload(name), 0))
    other = first_batches(workload, 1)
    assert any((x != y).any() for x, y in zip(batches[0], other[0], strict=True))
    assert len({tuple(x.shape for x in batch) for batch in batches}) == 1


def test_at_least_thirteen_workloads_of_a_few_hundred_steps():
    assert len(PROBLEMS) >= 13
    assert all(200 <= problem.steps <= 500 for problem in PROBLEMS.values())
    assert scaled_steps("vit", 0.1) == PROBLEMS["vit"].steps // 10


def test_masks_are_equally_many_and_hide_what_is_asked():
    windows = np.arange(5 * 16).reshape(5, 16)
    inputs, places, labels = masked(windows, 999, np.random.default_rng(0))
    assert ((inputs == 999).sum(axis=1) == 3).all()
    assert (np.take_along_axis(inputs, places, 1) == 999).all()
    np.testing.assert_array_equal(np.take_along_axis(windows, places, 1), labels)
    assert (inputs[inputs != 999] == windows[inputs != 999]).all()


def test_passages_of_the_test_are_in_no_training_passage():
    book = read_chapters(length=48, stride=4)
    assert book.num_chapters == 12
    assert set(book.train.labels) == set(book.test.labels) == set(range(12))
    assert book.train.inputs.max() < book.num_words
    for chapter in range(12):
        train = book.train.inputs[book.train.labels == chapter]
        test = book.test.inputs[book.test.labels == chapter]
        assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


def test_points_are_the_brightest_pixels():
    image = np.zeros((1, 8, 8, 1), np.float32)
    image[0, 0, 7], image[0, 7, 0] = 3.0, 2.0
    found = images.points(image)
    assert found.shape == (1, 32, 3)
    np.testing.assert_array_equal(found[0, :2], [[-1, 1, 3], [1, -1, 2]])


def test_pixels_of_a_photograph_are_divided():
    image = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    table = pixels(image)
    assert len(table.test_targets) == 3
    both = np.concatenate([table.train_targets, table.test_targets])
    np.testing.assert_allclose([both.mean(), both.std()], [0, 1], atol=1e-5)
    values = (image - image.mean()) / image.std()
    np.testing.assert_allclose(table.test_targets, values.ravel()[::10], rtol=1e-5)
    np.testing.assert_array_equal(table.test_inputs[0, :2], [-1, -1])


def test_perfect_reconstruction_has_no_loss():
    pixels = jnp.array([[0.25, 0.5, 0.9]])
    logits = jnp.log(pixels / (1 - pixels))
    np.testing.assert_allclose(divergences(logits, pixels), 0, atol=1e-6)
    assert divergences(logits + 1, pixels)[0] > 0.1


def test_contrast_by_hand():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 3, 4))
    both = np.concatenate([first, second])
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    losses = []
    for i in range(6):
        similar = np.exp([both[i] @ both[j] / 0.2 for j in range(6)])
        losses.append(-np.log(similar[(i + 3) % 6] / (similar.sum() - similar[i])))
    assert float(contrast(first, second)) == pytest.approx(np.mean(losses), rel=1e-4)


# --- the plan --------------------------------------------------------------------------------


def test_every_optimizer_has_as_many_rates_half_a_decade_apart():
    assert set(OWN_RATES) <= set(OPTIMIZERS)
    for rates in OWN_RATES.values():
        assert len(rates.values) == 3
        np.testing.assert_allclose(np.diff(np.log10(rates.values)), 0.5, atol=0.03)
        assert rates.reason


@pytest.mark.parametrize(
    ("rates", "optimizer", "expected"),
    [
        (None, "tekfac", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
        (None, "adam", (1e-3, 3e-3, 1e-2)),
        ("own", "tekfac", (1e-2, 3e-2, 1e-1)),
        ((0.5, 0.1), "sgd", (0.1, 0.5)),
    ],
)
def test_rates_of_a_plan(rates, optimizer, expected):
    plan = Plan(("vit",), (optimizer,), rates, 2, {"damping": "trace"}, 0.5)
    assert plan.rates_of(optimizer) == expected
    keys = plan.keys("vit", optimizer)
    assert len({key.file for key in keys}) == 2 * len(expected)
    options = {"damping": "trace"} if optimizer == "tekfac" else {}
    assert all(key.options == options and key.steps == 150 for key in keys)


def test_files_tell_options_apart():
    key = RunKey("vit", "tekfac", 0.03, 0, 300)
    names = {key._replace(options=o).file for o in ({}, {"a": 1}, {"a": 2}, {"b": 1})}
    assert len(names) == 4


# --- the command -----------------------------------------------------------------------------


def command(out, *more):
    main(["--workloads", "diabetes", "--steps-scale", "0.02", "--out", str(out), *more])


def stamps(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}


def test_command_resumes_and_reports(tmp_path, monkeypatch, capsys):
    command(tmp_path, "--optimizers", "adam,sgd")
    before = stamps(tmp_path)
    assert len(before) == 6
    text = (tmp_path / "report.md").read_text()
    assert "| adam | 1 | 1.00 |" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["sgd"]["overall"]["workloads"] == 1
    for name in ("profile.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size[0] > 100
    command(tmp_path, "--optimizers", "sgd", "--rates", "1e30", "--seeds", "2")
    after = stamps(tmp_path)
    assert len(after) == 8
    assert after.items() >= before.items()
    lost = json.loads((tmp_path / "runs" / "diabetes_sgd_1e+30_seed1_4steps.json").read_text())
    assert lost["lost"]
    monkeypatch.setattr(workloads, "Stepper", pytest.fail)
    command(tmp_path, "--optimizers", "adam,sgd")
    assert stamps(tmp_path) == after
    (tmp_path / "report.md").unlink()
    main(["--out", str(tmp_path), "--report", "--steps-scale", "0.02"])
    assert (tmp_path / "report.md").exists()
    assert "2 of 2" in capsys.readouterr().out


def test_options_reach_tekfac_and_the_key(tmp_path):
    command(tmp_path, "--optimizers", "tekfac", "--rates", "1e-3", "--options",
            "damping=trace,factor_interval=2")  # fmt: skip
    (path,) = (tmp_path / "runs").iterdir()
    assert json.loads(path.read_text())["options"] == {"damping": "trace", "factor_interval": 2}
    assert "tekfac damping=trace,factor_interval=2 at 0.001" in (tmp_path / "report.md").read_text()


def test_workloads_on_cifar_are_skipped_without_data(tmp_path, capsys):
    main(["--workloads", "vit,diabetes", "--optimizers", "sgd", "--steps-scale", "0.02",
          "--out", str(tmp_path)])  # fmt: skip
    out = capsys.readouterr().out
    assert "skipped for want of CIFAR (pass --data DIR): vit\n" in out
    assert len(stamps(tmp_path)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workloads mnist", "unknown workload 'mnist': choose from digits-cnn, resnet"),
        ("--optimizers lion", "unknown optimizer 'lion': choose from sgd, adam"),
        ("--rates fast", "--rates must be adam, own, or positive numbers, got 'fast'"),
        ("--rates 0.1,0", "--rates must be adam, own, or positive numbers, got '0.1,0'"),
        ("--options damping", "--options must be like damping=trace"),
        ("--options dumping=1 --optimizers tekfac", "tekfac has no setting 'dumping'"),
        ("--options damping=much --optimizers tekfac", "--options do not suit tekfac: damping"),
        ("--seeds 0", "--seeds must be 1 or more, got 0"),
        ("--steps-scale 0", "--steps-scale must be positive, got 0"),
        ("--report", "no optimizer has finished a workload in"),
        ("--workloads vit --data nowhere", "nowhere"),
    ],
)
def test_refused_in_one_sentence(tmp_path, arguments, message, capsys):
    base = ["--workloads", "diabetes", "--steps-scale", "0.02", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main([*base, *arguments.split()])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_damaged_record_is_named(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_text("{}")
    with pytest.raises(SystemExit):
        command(tmp_path, "--report")
    assert "is no record of a run" in capsys.readouterr().err
