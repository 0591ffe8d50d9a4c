"""Networks from images to images: a deep autoencoder, a U-Net, and a noise predictor."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Autoencoder(nn.Module):
    """A deep bottleneck with tanh (Hinton and Salakhutdinov 2006), K-FAC's classic problem.

    The code is linear. The outputs are logits of the pixels.
    """

    widths: Sequence[int] = (256, 128, 64)
    code: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, pixels) to (N, pixels)."""
        del train  # nothing here behaves differently in training
        pixels = x.shape[-1]
        for width in self.widths:
            x = jnp.tanh(nn.Dense(width)(x))
        x = nn.Dense(self.code)(x)
        for width in reversed(self.widths):
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(pixels)(x)


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015): two halvings, transposed convolutions back up."""

    width: int = 12
    levels: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to the same shape; H and W multiples of 2^levels."""
        del train  # nothing here behaves differently in training
        channels, skips = x.shape[-1], []
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        for level in range(1, 1 + self.levels):
            skips.append(x)
            x = nn.relu(nn.Conv(2**level * self.width, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(x.shape[-1], (3, 3))(x))
        for skip in reversed(skips):
            x = nn.relu(nn.ConvTranspose(skip.shape[-1], (2, 2), strides=(2, 2))(x))
            x = nn.relu(nn.Conv(skip.shape[-1], (3, 3))(jnp.concatenate([x, skip], axis=-1)))
        return nn.Conv(channels, (3, 3))(x)


def time_features(t: jax.Array, number: int) -> jax.Array:
    """Sines and cosines of times (N,) in 0..1, at frequencies from ½ to 64 periods: (N, number)."""
    frequencies = jnp.asarray(np.pi * 2.0 ** np.linspace(0, 7, number // 2), t.dtype)
    angles = t[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class NoisePredictor(nn.Module):
    """Predicts the noise in an image, given how much of it there is (DDPM, Ho et al. 2020).

    Residual blocks with GroupNorm; the time enters each as a shift of its channels. As in the
    paper, the last convolution and the second one of each block start at zero.
    """

    width: int = 24
    blocks: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Images (N, H, W, C) and times (N,) to noise (N, H, W, C)."""
        time = nn.silu(nn.Dense(2 * self.width)(time_features(t, 32)))
        y = nn.Conv(self.width, (3, 3))(x)
        for _ in range(self.blocks):
            z = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(4)(y)))
            z = z + nn.Dense(self.width)(time)[:, None, None, :]
            z = nn.silu(nn.GroupNorm(4)(z))
            y = y + nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.zeros)(z)
        y = nn.silu(nn.GroupNorm(4)(y))
        return nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(y)
