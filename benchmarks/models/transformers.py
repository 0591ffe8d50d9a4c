"""Transformers: a ViT for images, a decoder for text, both pre-norm, and a post-norm encoder."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from benchmarks.errors import UsageError


def head(num_classes: int, dtype: Dtype | None, *, zero: bool = False) -> nn.Dense:
    """The last layer: in float32, like the loss after it, even if the rest is in half precision.

    With `zero` its kernel starts at zero, so that all classes start out equally likely.
    """
    kernel_init: Any = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    head_dtype = None if dtype is None else jnp.float32
    return nn.Dense(num_classes, dtype=head_dtype, kernel_init=kernel_init)


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

    207,946 parameters for 10 classes and 32×32×3 images, which become 64 positions. As in the
    paper, `class_token` adds a learned position that alone is read at the end, and `zero_head`
    starts the last layer at zero.
    """

    num_classes: int = 10
    width: int = 64
    affine: bool = True
    depth: int = 4
    heads: int = 4
    patch: int = 4
    dtype: Dtype | None = None
    class_token: bool = False
    zero_head: bool = False

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
        if self.class_token:
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        x = x + embed(x.shape[1], name="positions")(_positions(x))
        for _ in range(self.depth):
            x = _Block(self.heads, causal=False, affine=self.affine, dtype=self.dtype)(x)
        x = _norm(self.affine, self.dtype)(x)
        x = x[:, 0] if self.class_token else x.mean(axis=1)
        return head(self.num_classes, self.dtype, zero=self.zero_head)(x)


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


class _PostNormBlock(nn.Module):
    """Attention, then two dense layers, each added to its input and then normalised."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, width) to the same shape."""
        width = x.shape[-1]
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(self.heads)(x))
        y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(x)))
        return nn.LayerNorm()(x + y)


class MaskedTransformer(nn.Module):
    """An encoder that restores masked characters (BERT, Devlin et al. 2019, sections 3 and A.2)."""

    num_classes: int
    vocabulary: int  # the mask is one more character than can be predicted
    width: int = 64
    depth: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Characters (N, T), integers below `vocabulary`, to logits (N, T, num_classes)."""
        del train  # nothing here behaves differently in training
        embed = functools.partial(nn.Embed, features=self.width)
        positions = embed(x.shape[1], name="positions")(_positions(x))
        x = nn.LayerNorm()(embed(self.vocabulary, name="characters")(x) + positions)
        for _ in range(self.depth):
            x = _PostNormBlock(self.heads)(x)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(self.width)(x)))
        return nn.Dense(self.num_classes)(x)
