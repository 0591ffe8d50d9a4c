"""Learning without labels: two views of an image must be alike, and unlike all others."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data.augment import crop
from benchmarks.data.sets import load_dataset
from benchmarks.models.siamese import Siamese
from benchmarks.problems.workload import Batch, ModelState, Params, Workload, epochs, initialiser

_TEMPERATURE = 0.2


def simclr(name: str, steps: int, data: Path | None) -> Workload:
    """SimCLR on digits: shifted, noisy views; one encoder is called for both.

    It is validated by the label of the nearest training image.
    """
    del data
    digits, model = load_dataset("digits"), Siamese()
    train, test = digits.train_inputs, digits.test_inputs

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        (images,) = batch
        views = [view(key, images) for key in jax.random.split(key)]
        found: Any = model.apply({"params": params}, *views)
        return contrast(*found), model_state

    @jax.jit
    def features(params: Params, images: Any) -> jax.Array:
        found: Any = model.apply({"params": params}, images, method="features")
        return found / jnp.linalg.norm(found, axis=1, keepdims=True).clip(1e-6)

    def validate(params: Params, model_state: ModelState) -> float:
        del model_state
        known, asked = (np.asarray(features(params, images)) for images in (train, test))
        nearest = (asked @ known.T).argmax(axis=1)
        return 100 * float((digits.train_labels[nearest] == digits.test_labels).mean())

    return Workload(
        name, steps, initialiser(model, train[:1], train[:1]), loss_fn,
        epochs(train, batch_size=128), validate, metric="nearest neighbour %",
        higher_is_better=True,
    )  # fmt: skip


def view(key: jax.Array, images: jax.Array) -> jax.Array:
    """Images shifted by up to one pixel, with a little noise."""
    of_crop, of_noise = jax.random.split(key)
    return crop(of_crop, images, padding=1) + 0.3 * jax.random.normal(of_noise, images.shape)


def contrast(first: jax.Array, second: jax.Array) -> jax.Array:
    """SimCLR's loss (NT-Xent): the cross-entropy of finding an image's other view among all."""
    both = jnp.concatenate([first, second])
    both = both / jnp.linalg.norm(both, axis=1, keepdims=True).clip(1e-6)
    number, similar = len(first), both @ both.T / _TEMPERATURE
    others = jnp.where(jnp.eye(2 * number, dtype=bool), -jnp.inf, similar)
    labels = (jnp.arange(2 * number) + number) % (2 * number)
    return optax.softmax_cross_entropy_with_integer_labels(others, labels).mean()
