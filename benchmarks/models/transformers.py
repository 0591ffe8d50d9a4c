"""Transformers: a ViT for images, and a decoder for text. Blocks are pre-norm."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from benchmarks.errors import UsageError


def head(num_classes: int, dtype: Dtype | None) -> nn.Dense:
    """The last layer: in float32, like the loss after it, even if the rest is in half precision."""
    return nn.Dense(num_classes, dtype=None if dtype is None else jnp.float32)


class _Block(nn.Module):
    """Attention, then two dense layers, each beside an identity shortcut."""

    heads: int
    causal: bool
    affine: bool
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, width) to the same shape."""
        width = x.shape[-1]
        if width % self.heads:
            raise UsageError(
                f"a width of {width} cannot be divided among {self.heads} heads: choose a "
                f"--width that is a multiple of {self.heads}"
            )
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        y = _norm(self.affine, self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y, mask=mask)
        y = nn.Dense(4 * width, dtype=self.dtype)(_norm(self.affine, self.dtype)(x))
        return x + nn.Dense(width, dtype=self.dtype)(nn.gelu(y))


def _norm(affine: bool, dtype: Dtype | None) -> nn.LayerNorm:
    return nn.LayerNorm(use_bias=affine, use_scale=affine, dtype=dtype)


def _positions(x: jax.Array) -> jax.Array:
    """The positions of (N, T, ...) as numbers (N, T): every example looks up its own."""
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021): 4×4 patches, mean over positions.

    207,946 parameters for 10 classes and 32×32×3 images, which become 64 positions.
    """

    num_classes: int = 10
    width: int = 64
    affine: bool = True
    depth: int = 4
    heads: int = 4
    patch: int = 4
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes); H and W multiples of `patch`."""
        del train  # nothing here behaves differently in training
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UsageError(
                f"vit cuts images into patches of {self.patch}x{self.patch}, these are "
                f"{x.shape[1]}x{x.shape[2]}: choose images whose sides are multiples of "
                f"{self.patch}, or another --model"
            )
        size = (self.patch, self.patch)
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.dtype)
        x = nn.Conv(self.width, size, strides=size, dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + embed(x.shape[1], name="positions")(_positions(x))
        for _ in range(self.depth):
            x = _Block(self.heads, causal=False, affine=self.affine, dtype=self.dtype)(x)
        x = _norm(self.affine, self.dtype)(x).mean(axis=1)
        return head(self.num_classes, self.dtype)(x)


class Transformer(nn.Module):
    """A decoder-only transformer: it predicts every character from those before it in its window.

    212,674 parameters for windows of 64 and 66 distinct characters.
    """

    num_classes: int
    width: int = 64
    affine: bool = True
    depth: int = 4
    heads: int = 4
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Characters (N, T), integers below `num_classes`, to logits (N, T, num_classes)."""
        del train  # nothing here behaves differently in training
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.dtype)
        positions = embed(x.shape[1], name="positions")(_positions(x))
        x = embed(self.num_classes, name="characters")(x) + positions
        for _ in range(self.depth):
            x = _Block(self.heads, causal=True, affine=self.affine, dtype=self.dtype)(x)
        return head(self.num_classes, self.dtype)(_norm(self.affine, self.dtype)(x))
