"""Transformers: a ViT for images, and a decoder for text. Blocks are pre-norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.errors import UsageError


class _Block(nn.Module):
    """Attention, then two dense layers, each beside an identity shortcut."""

    heads: int
    causal: bool
    affine: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, width) to the same."""
        width = x.shape[-1]
        if width % self.heads:
            raise UsageError(
                f"a width of {width} cannot be shared out among {self.heads} heads: choose for "
                f"--width a multiple of {self.heads}"
            )
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        y = _norm(self.affine)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask)
        y = nn.Dense(4 * width)(_norm(self.affine)(x))
        return x + nn.Dense(width)(nn.gelu(y))


def _norm(affine: bool) -> nn.LayerNorm:
    return nn.LayerNorm(use_bias=affine, use_scale=affine)


def _positions(x: jax.Array) -> jax.Array:
    """Numbers of the positions of (N, T, ...), (N, T): every example looks its own up."""
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021): 4×4 patches, mean over positions.

    207,946 parameters for 32×32×3 images and 10 classes, which become 64 positions.
    """

    num_classes: int = 10
    width: int = 64
    affine: bool = True
    depth: int = 4
    heads: int = 4
    patch: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes); H and W multiples of `patch`."""
        del train  # nothing here behaves differently in training
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UsageError(
                f"vit cuts images into patches of {self.patch}x{self.patch}, these are "
                f"{x.shape[1]}x{x.shape[2]}: choose images that such patches divide, or another "
                "--model"
            )
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + nn.Embed(x.shape[1], self.width, name="positions")(_positions(x))
        for _ in range(self.depth):
            x = _Block(self.heads, causal=False, affine=self.affine)(x)
        return nn.Dense(self.num_classes)(_norm(self.affine)(x).mean(axis=1))


class Transformer(nn.Module):
    """A decoder-only transformer: every character from those before it in its window.

    212,674 parameters for windows of 64 with 66 different characters.
    """

    num_classes: int
    width: int = 64
    affine: bool = True
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Characters (N, T), whole numbers below `num_classes`, to logits (N, T, num_classes)."""
        del train  # nothing here behaves differently in training
        positions = nn.Embed(x.shape[1], self.width, name="positions")(_positions(x))
        x = nn.Embed(self.num_classes, self.width, name="characters")(x) + positions
        for _ in range(self.depth):
            x = _Block(self.heads, causal=True, affine=self.affine)(x)
        return nn.Dense(self.num_classes)(_norm(self.affine)(x))
