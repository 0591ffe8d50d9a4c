"""What a workload is: pure functions, from the initial parameters to the validation metric."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

Params = Any
ModelState = Any  # the running averages of BatchNorm; empty without
Batch = tuple[Any, ...]  # arrays whose leading axis is the batch
Loss = Callable[[Params, ModelState, Batch, jax.Array], tuple[jax.Array, ModelState]]
# From (params, model_state, *arrays) to one value for each example.
Values = Callable[..., jax.Array]
Measure = Callable[[Params, ModelState], float]


class Workload(NamedTuple):
    """A problem to train, the same for every optimizer.

    Every loss is a mean over the examples of the batch, and positive.
    """

    name: str
    steps: int
    init: Callable[[jax.Array], tuple[Params, ModelState]]  # from a key
    loss_fn: Loss  # in training mode; its key is of everything random in a step
    batches: Callable[[int], Iterator[Batch]]  # from a seed; endless, all of the same shapes
    validate: Measure
    metric: str  # what `validate` returns
    higher_is_better: bool
    full_loss: Measure | None = None  # on the whole training set, where that is small


def epochs(*arrays: np.ndarray, batch_size: int) -> Callable[[int], Iterator[Batch]]:
    """Batches of arrays, in a new order in every epoch; an incomplete last batch is left out."""

    def batches(seed: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(arrays[0]))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen = order[start : start + batch_size]
                yield tuple(array[chosen] for array in arrays)
            epoch += 1

    return batches


def mean_over(values: Values, *arrays: np.ndarray, chunk: int = 500) -> Measure:
    """The mean of a value over all examples, computed in chunks."""
    compiled = jax.jit(values)

    def measure(params: Params, model_state: ModelState) -> float:
        total = 0.0
        for start in range(0, len(arrays[0]), chunk):
            part = [array[start : start + chunk] for array in arrays]
            total += float(np.sum(jax.device_get(compiled(params, model_state, *part))))
        return total / len(arrays[0])

    return measure


def whole_loss(loss_fn: Loss, *arrays: np.ndarray) -> Measure:
    """The loss on the whole training set as one batch, with a fixed key; not for BatchNorm."""
    compiled = jax.jit(loss_fn)  # the arrays are arguments: XLA would fold constants

    def measure(params: Params, model_state: ModelState) -> float:
        return float(compiled(params, model_state, arrays, jax.random.key(0))[0])

    return measure


def initialiser(
    model: nn.Module, *example: np.ndarray
) -> Callable[[jax.Array], tuple[Params, ModelState]]:
    """Parameters and BatchNorm averages of a network that is called with `example`."""
    compiled = jax.jit(lambda key: model.init(key, *example))

    def init(key: jax.Array) -> tuple[Params, ModelState]:
        variables = compiled(key)
        return variables["params"], variables.get("batch_stats", {})

    return init


def training_outputs(
    model: nn.Module, params: Params, model_state: ModelState, inputs: Any
) -> tuple[jax.Array, ModelState]:
    """A network's outputs in training mode, and its new BatchNorm averages."""
    outputs, updated = model.apply(
        {"params": params, "batch_stats": model_state}, inputs, train=True, mutable=["batch_stats"]
    )
    return outputs, updated.get("batch_stats", {})


def outputs(model: nn.Module, params: Params, model_state: ModelState, inputs: Any) -> jax.Array:
    """A network's outputs in evaluation mode."""
    found: Any = model.apply({"params": params, "batch_stats": model_state}, inputs)
    return found


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each example, the mean over its positions if it has several; (N,)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.reshape(len(losses), -1).mean(axis=1)


def percent_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """100 for each example whose largest logit is that of its label, 0 for the others; (N,)."""
    return 100.0 * (logits.argmax(axis=-1) == labels)


def classification(
    name: str,
    steps: int,
    model: nn.Module,
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    *,
    batch_size: int,
    small: bool = False,
    by_loss: bool = False,
) -> Workload:
    """A network from inputs to classes, with the mean cross-entropy as its loss.

    Args:
        name: of the workload.
        steps: length of a run.
        model: from inputs to logits, called as (inputs, train=...).
        train: inputs and labels.
        test: the same for validation.
        batch_size: examples of a batch.
        small: whether the loss of the whole training set is measured; not with BatchNorm.
        by_loss: validates by the loss instead of the accuracy.
    """

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        del key  # nothing here is random
        inputs, labels = batch
        logits, model_state = training_outputs(model, params, model_state, inputs)
        return cross_entropies(logits, labels).mean(), model_state

    def values(params: Params, model_state: ModelState, inputs: Any, labels: Any) -> jax.Array:
        value = cross_entropies if by_loss else percent_correct
        return value(outputs(model, params, model_state, inputs), labels)

    return Workload(
        name, steps, initialiser(model, train[0][:1]), loss_fn,
        epochs(*train, batch_size=batch_size), mean_over(values, *test),
        metric="validation loss" if by_loss else "accuracy %", higher_is_better=not by_loss,
        full_loss=whole_loss(loss_fn, *train) if small else None,
    )  # fmt: skip
