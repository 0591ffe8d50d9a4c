"""Multilayer perceptrons on tables: a regression and a classification."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.data.tables import read_breast_cancer, read_diabetes
from benchmarks.models.pooled import MLP
from benchmarks.problems.workload import (
    Batch,
    ModelState,
    Params,
    Workload,
    classification,
    epochs,
    initialiser,
    mean_over,
    outputs,
    whole_loss,
)


def diabetes(name: str, steps: int, data: Path | None) -> Workload:
    """A regression: the loss is the mean squared error of the standardised target."""
    del data
    table, model = read_diabetes(), MLP((256, 256, 256), 1)

    def errors(params: Params, model_state: ModelState, inputs: Any, targets: Any) -> jax.Array:
        return jnp.square(outputs(model, params, model_state, inputs)[:, 0] - targets)

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        del key  # nothing here is random
        return errors(params, model_state, *batch).mean(), model_state

    train = (table.train_inputs, table.train_targets)
    return Workload(
        name, steps, initialiser(model, train[0][:1]), loss_fn, epochs(*train, batch_size=128),
        mean_over(errors, table.test_inputs, table.test_targets),
        metric="squared error", higher_is_better=False, full_loss=whole_loss(loss_fn, *train),
    )  # fmt: skip


def breast_cancer(name: str, steps: int, data: Path | None) -> Workload:
    """A classification that every optimizer can fit; the validation loss tells how well."""
    del data
    table, model = read_breast_cancer(), MLP((256, 256), 2)
    train, test = table[:2], table[2:]
    return classification(name, steps, model, train, test, batch_size=128, small=True, by_loss=True)
