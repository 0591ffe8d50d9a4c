"""Training, timing and the two searches: a run learns, repeats itself, and stops if it diverges."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from benchmarks.data.sets import load_dataset
from benchmarks.errors import UsageError
from benchmarks.models.transformers import Transformer, ViT
from benchmarks.optimizers.recipes import OPTIMIZERS, Curvature
from benchmarks.training import halving, timing
from benchmarks.training.halving import Rung, candidates, grid_size
from benchmarks.training.loop import Schedule, Task, Trainer, cosine
from benchmarks.training.search import TRIALS, search_learning_rate
from benchmarks.training.timing import random_images

FREQUENT = Curvature(5, 5, 5)


class WithNorm(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def task():
    return Task(load_dataset("digits", subset=640), WithNorm(), batch_size=64)


@pytest.mark.sampled
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_repeats_itself(task, name):
    trainer = Trainer(task, name, FREQUENT)
    run, again = (trainer.train(0.03, epochs=6, seed=7) for _ in range(2))
    assert len(run.epochs) == 6
    assert len(run.step_seconds) == 60
    assert run.train_loss < 0.5 * run.epochs[0].train_loss
    assert run.epochs_to(0.5) is not None
    # The evaluation uses the running averages of BatchNorm: they must have been carried along.
    assert run.train_loss < 2 * run.epochs[-1].train_loss
    losses = [r.epochs[0].train_loss for r in (run, again, trainer.train(0.03, epochs=6, seed=8))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "rate", "accuracy"),
    [
        (ViT(10, width=16, depth=1, patch=2), "digits", 0.03, 0.5),
        (Transformer(66, width=16, depth=1), "alice", 3e-4, 0.25),
    ],
    ids=["vit", "transformer"],
)
def test_transformers_learn(model, data, rate, accuracy):
    task = Task(load_dataset(data, subset=512), model, batch_size=32)
    trainer = Trainer(task, "tekfac", Curvature(5, 5, 5, "trace"))
    assert trainer.layers is not None
    assert len(trainer.layers) == 9
    run = trainer.train(rate, epochs=4, seed=0)
    assert run.train_loss < 0.9 * run.epochs[0].train_loss
    assert run.epochs_to(accuracy) is not None


@pytest.mark.slow
def test_evaluation_is_a_mean_over_characters():
    alice = load_dataset("alice", subset=40)
    task = Task(alice, Transformer(alice.num_classes, width=8, depth=1), batch_size=40)
    state = Trainer(task, "sgd", FREQUENT).initial_state(0)
    loss, accuracy = task.evaluate(state, "test")
    logits: Any = task.model.apply({"params": state.params}, alice.test_inputs)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    chosen = np.take_along_axis(log_probabilities, alice.test_labels[..., None], axis=-1)
    assert loss == pytest.approx(-chosen.mean(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(axis=-1) == alice.test_labels).mean())


def test_divergence_ends_a_run(task):
    run = Trainer(task, "sgd", FREQUENT).train(1e30, epochs=3, seed=0)
    assert run.diverged
    assert run.train_loss == np.inf
    assert len(run.epochs) < 3
    assert run.epochs_to(0.1) is None


def test_batches_are_a_permutation(task):
    seen = np.concatenate([labels for _, labels in task.batches(seed=1, epoch=1)])
    np.testing.assert_array_equal(np.sort(seen), np.sort(task.dataset.train_labels))
    other = np.concatenate([labels for _, labels in task.batches(seed=1, epoch=2)])
    assert (seen != other).any()


def test_batch_larger_than_the_data_is_refused(task):
    with pytest.raises(UsageError, match="641 is more than the 640 training images"):
        Task(task.dataset, task.model, batch_size=641)


def test_cosine():
    assert cosine(0.3, 0.0) == pytest.approx(0.3)
    assert cosine(0.3, 0.5) == pytest.approx(0.15)
    assert cosine(0.3, 1.0) == pytest.approx(0.0)


def test_step_decay():
    schedule = Schedule(decay_every=40, factor=0.1)
    assert [schedule.rate(1.0, done, 100) for done in (0, 39.99, 40, 80)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )


# --- the search for a learning rate ----------------------------------------------------------


@pytest.mark.parametrize("best", [1e-4, 1e-3, 4e-3, 0.01, 0.02, 0.3, 10.0])
def test_search_finds_the_best_rate(best):
    search = search_learning_rate(lambda rate: abs(np.log10(rate / best)), start=0.01)
    assert len(search.losses) == TRIALS
    assert abs(np.log10(search.best / best)) < 0.4
    assert search.at_edge == (best in (1e-4, 10.0) and search.best in (1e-5, 10.0))


def test_search_survives_divergence():
    search = search_learning_rate(lambda rate: np.nan if rate > 1e-3 else rate, start=1.0)
    assert search.best in search.losses
    assert search.losses[1.0] == np.inf
    assert search.losses[search.best] <= 1e-3


# --- successive halving ----------------------------------------------------------------------


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
    assert halving.search(found, (Rung(1, 3), Rung(4, 1)), score) == {"x": 3}
    assert calls == [(x, 1) for x in range(6)] + [(x, 4) for x in (4, 3, 2)]
    calls.clear()
    assert halving.search([{"x": 1}], (Rung(1, 1),), score) == {"x": 1}
    assert not calls


# --- timing ----------------------------------------------------------------------------------


def test_images_have_a_natural_spectrum():
    images, labels = random_images((16, 12, 2), 40)
    assert images.shape == (40, 16, 12, 2)
    assert images.dtype == np.float32
    assert set(labels) <= set(range(10))
    power = (np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2).mean(axis=(0, 3))
    assert power[0, 1] > 3 * power[0, 3] > 9 * power[0, 6]


def test_peaks_by_the_name_of_a_gpu():
    assert timing.peak_teraflops("NVIDIA H100 80GB HBM3") == 494.7
    assert timing.peak_teraflops("cpu") is None
