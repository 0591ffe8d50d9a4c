"""From images to images: an autoencoder, a denoiser, and a small diffusion model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import xlogy
from numpy.typing import NDArray

from benchmarks.data.photographs import patches, read_photographs
from benchmarks.data.sets import load_dataset
from benchmarks.models.autoencoders import Autoencoder, NoisePredictor, UNet
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

_SIZE = 16  # of the denoiser's patches
_NOISE = 0.4  # deviation of the denoiser's noise; that of its pixels is about 1


def _digits() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Training and test digits (N, 8, 8, 1), with pixels in 0..1."""
    digits = load_dataset("digits")
    low, high = digits.train_inputs.min(), digits.train_inputs.max()
    train, test = ((x - low) / (high - low) for x in (digits.train_inputs, digits.test_inputs))
    return train, test


# --- an autoencoder --------------------------------------------------------------------------


def autoencoder(name: str, steps: int, data: Path | None) -> Workload:
    """K-FAC's classic: a deep bottleneck on digits, whose loss is a sum over the pixels.

    The loss is the pixels' cross-entropy without their own entropy, so that 0 is perfect.
    """
    del data
    model = Autoencoder()
    train, test = (images.reshape(len(images), -1) for images in _digits())

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        del key  # nothing here is random
        (images,) = batch
        logits = outputs(model, params, model_state, images)
        return divergences(logits, images).mean(), model_state

    def errors(params: Params, model_state: ModelState, images: Any) -> jax.Array:
        restored = jax.nn.sigmoid(outputs(model, params, model_state, images))
        return jnp.square(restored - images).sum(axis=1)

    return Workload(
        name, steps, initialiser(model, train[:1]), loss_fn, epochs(train, batch_size=256),
        mean_over(errors, test), metric="squared error", higher_is_better=False,
        full_loss=whole_loss(loss_fn, train),
    )  # fmt: skip


def divergences(logits: jax.Array, images: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of each image, summed over its pixels; (N, pixels) to (N,)."""
    entropies = -xlogy(images, images) - xlogy(1 - images, 1 - images)
    return (optax.sigmoid_binary_cross_entropy(logits, images) - entropies).sum(axis=1)


# --- a denoiser ------------------------------------------------------------------------------


def denoiser(name: str, steps: int, data: Path | None) -> Workload:
    """A U-Net removes noise from patches of two photographs: mean squared error."""
    del data
    model, photographs = UNet(), read_photographs()

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        while True:
            yield (_standardised(patches(photographs.train, 32, _SIZE, rng)),)

    def errors(params: Params, model_state: ModelState, images: Any, noise: Any) -> jax.Array:
        restored = outputs(model, params, model_state, images + _NOISE * noise)
        return jnp.square(restored - images).mean(axis=(1, 2, 3))

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        (images,) = batch
        noise = jax.random.normal(key, images.shape)
        return errors(params, model_state, images, noise).mean(), model_state

    rng = np.random.default_rng(0)
    test = _standardised(patches(photographs.test, 500, _SIZE, rng))
    noise = rng.normal(size=test.shape).astype(np.float32)
    return Workload(
        name, steps, initialiser(model, test[:1]), loss_fn, batches,
        mean_over(errors, test, noise), metric="squared error", higher_is_better=False,
    )  # fmt: skip


def _standardised(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Roughly mean 0 and deviation 1."""
    return (pixels - np.float32(0.5)) * np.float32(4)


# --- diffusion -------------------------------------------------------------------------------


def diffusion(name: str, steps: int, data: Path | None) -> Workload:
    """A denoising diffusion model of digits: the loss is the mean squared error of the noise."""
    del data
    model = NoisePredictor()
    train, test = (2 * images - 1 for images in _digits())

    def errors(params: Params, images: Any, times: Any, noise: Any) -> jax.Array:
        # Cosine schedule (Nichol and Dhariwal 2021): image² and noise² add up to 1.
        angle = 0.5 * jnp.pi * times[:, None, None, None]
        mixed = jnp.cos(angle) * images + jnp.sin(angle) * noise
        found: Any = model.apply({"params": params}, mixed, times)
        return jnp.square(found - noise).mean(axis=(1, 2, 3))

    def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> Any:
        (images,) = batch
        of_times, of_noise = jax.random.split(key)
        times = jax.random.uniform(of_times, (len(images),))
        noise = jax.random.normal(of_noise, images.shape)
        return errors(params, images, times, noise).mean(), model_state

    def values(params: Params, model_state: ModelState, *batch: Any) -> jax.Array:
        del model_state
        return errors(params, *batch)

    rng = np.random.default_rng(0)
    times = ((np.arange(len(test)) + 0.5) / len(test)).astype(np.float32)
    noise = rng.normal(size=test.shape).astype(np.float32)
    return Workload(
        name, steps, initialiser(model, train[:1], times[:1]), loss_fn,
        epochs(train, batch_size=64), mean_over(values, test, times, noise),
        metric="validation loss", higher_is_better=False,
    )  # fmt: skip
