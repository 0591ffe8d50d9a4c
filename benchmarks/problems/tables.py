"""Regressions by multilayer perceptrons: of a table, and of a photograph's pixels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.data.photographs import read_photographs
from benchmarks.data.tables import Table, read_diabetes
from benchmarks.models.pooled import MLP
from benchmarks.problems.workload import (
    Batch,
    ModelState,
    Params,
    Workload,
    epochs,
    initialiser,
    mean_over,
    outputs,
    whole_loss,
)

_SIDE = 128  # of the piece of the photograph
_OCTAVES = 6  # of the features of a coordinate


def diabetes(name: str, steps: int, data: Path | None) -> Workload:
    """A small table: the progress of a disease in 353 patients."""
    del data
    return _regression(name, steps, read_diabetes(), MLP((64, 64), 1), batch_size=64)


def photograph(name: str, steps: int, data: Path | None) -> Workload:
    """A network as an image: from the coordinates of a pixel to its brightness."""
    del data
    table = pixels(read_photographs().train[0][-_SIDE:, :_SIDE])
    return _regression(name, steps, table, MLP((128, 128, 128), 1), batch_size=1024)


def pixels(image: NDArray[np.float32]) -> Table:
    """A table of an image's pixels, standardised; every tenth one is for the test."""
    places = np.indices(image.shape).reshape(2, -1).T / (np.array(image.shape) - 1)
    angles = np.pi * places[:, :, None] * 2.0 ** np.arange(_OCTAVES)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    features = np.concatenate([2 * places - 1, waves.reshape(len(places), -1)], axis=1)
    values = (image - image.mean()) / image.std()
    inputs, targets = features.astype(np.float32), values.ravel().astype(np.float32)
    test = np.arange(len(targets)) % 10 == 0
    return Table(inputs[~test], targets[~test], inputs[test], targets[test])


def _regression(name: str, steps: int, table: Table, model: MLP, *, batch_size: int) -> Workload:
    """The loss is the mean squared error of the standardised target."""

    def errors(
        params: Params, model_state: ModelState, inputs: jax.Array, targets: jax.Array
    ) -> jax.Array:
        return jnp.square(outputs(model, params, model_state, inputs)[:, 0] - targets)

    def loss_fn(
        params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        del key  # nothing here is random
        return errors(params, model_state, *batch).mean(), model_state

    train = (table.train_inputs, table.train_targets)
    return Workload(
        name, steps, initialiser(model, train[0][:1]), loss_fn,
        epochs(*train, batch_size=batch_size),
        mean_over(errors, table.test_inputs, table.test_targets),
        metric="squared error", higher_is_better=False, full_loss=whole_loss(loss_fn, *train),
    )  # fmt: skip
