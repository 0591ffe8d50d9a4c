"""What the examples have in common: digits, a small network with BatchNorm, and its loss."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import tekfac_jax as tekfac
from benchmarks.data.sets import load_dataset

BATCH = 64


class Net(nn.Module):
    """A convolution with BatchNorm, and a dense layer.

    Attributes:
        axis_name: the axis of `pmap` or `shard_map` over which BatchNorm averages; under `jit`
            with sharded data there is none, since every program sees the whole batch.
    """

    axis_name: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (N, 8, 8, 1) to logits (N, 10), with the statistics of this batch."""
        x = nn.Conv(6, (3, 3), strides=2, use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x))
        return nn.Dense(10)(x.reshape(len(x), -1)[:, ::4])


class TrainState(tekfac.TrainState):
    """Parameters, optimizer state, and BatchNorm's averages."""

    batch_stats: Any


def make_loss(model: nn.Module) -> Callable[..., Any]:
    """The loss of a batch, its mean over the examples, and the new averages of BatchNorm."""

    def loss_fn(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    return loss_fn


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a step: the same in every process and every run."""
    digits = load_dataset("digits")
    rows = np.random.default_rng(step).choice(len(digits.train_labels), BATCH, replace=False)
    return digits.train_inputs[rows], digits.train_labels[rows]


def find(model: nn.Module) -> tuple[tekfac.Layers, Any]:
    """The layers of the network, and its first variables."""
    images, labels = batch(0)
    plain = model.clone(axis_name=None)  # outside a pmap there is no axis
    variables = plain.init(jax.random.key(0), images)
    loss_fn = make_loss(plain)
    arguments = variables["params"], variables["batch_stats"], images, labels
    return tekfac.find_layers(loss_fn, *arguments), variables


def first_state(model: nn.Module, layers: tekfac.Layers, variables: Any, **options: Any) -> Any:
    """The train state before the first step; `options` are those of `tekfac`.

    The intervals are short because the examples are.
    """
    tx = tekfac.tekfac(
        0.05, layers, factor_interval=2, eigenbasis_interval=4, rescaling_interval=2, **options
    )
    return TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=tx,
        batch_stats=variables["batch_stats"],
    )  # fmt: skip
