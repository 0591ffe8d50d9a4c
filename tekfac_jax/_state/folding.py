"""Matrices folded into one axis that any usual number of devices divides evenly.

A 577×577 matrix has no axis that eight devices could divide. Folded into one axis and padded with
zeros it does, and its length is the same for every number of devices, so a checkpoint does not
depend on that number.
"""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jnp.pad` and `reshard` untyped.

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tekfac_jax._state.layout import LayerState

# 2^9 · 3 · 5: among its divisors are all powers of two up to 512, and 1 to 6, 8, 10, 12, 15, ...
FOLD = 7680


def folded_size(shape: Sequence[int]) -> int:
    """Length of a folded array: the next multiple of `FOLD`."""
    return -(-math.prod(shape) // FOLD) * FOLD


def fold(x: jax.Array) -> jax.Array:
    """An array as one axis, padded with zeros."""
    return jnp.pad(x.ravel(), (0, folded_size(x.shape) - x.size))


def unfold(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The inverse of `fold`; an array that already has that shape is returned unchanged."""
    if x.shape == tuple(shape):
        return x
    return _on_every_device(x)[: math.prod(shape)].reshape(shape)


def _on_every_device(x: jax.Array) -> jax.Array:
    """Replicates an array if the mesh has explicit axes; otherwise the compiler does so."""
    sharding = jax.typeof(x).sharding
    if any(axis is not None for axis in sharding.spec):
        return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


# The matrices of a layer that may be folded, the bulk of its state; square in a whole basis.
SQUARES = ("phi", "psi", "q_phi", "q_psi")


def is_folded(layer: LayerState, name: str) -> bool:
    """Whether that matrix is folded. An embedding's Φ is a vector and is never folded."""
    return name in _square_names(layer) and getattr(layer, name).ndim == 1


def _square_shape(layer: LayerState, name: str) -> tuple[int, ...]:
    """The shape of an unfolded matrix, from Θ, which is never folded."""
    *lead, i, o = layer.theta.shape
    dim = i if name.endswith("phi") else o
    return (*lead, dim, dim)


def unfolded(layer: LayerState) -> LayerState:
    """The layer with all its matrices unfolded."""
    squares = {
        name: unfold(getattr(layer, name), _square_shape(layer, name))
        for name in SQUARES
        if is_folded(layer, name)
    }
    return layer._replace(**squares)


def folded(layer: LayerState) -> LayerState:
    """The layer with its matrices folded."""
    squares = {name: fold(getattr(layer, name)) for name in _square_names(layer)}
    return layer._replace(**squares)


def _square_names(layer: LayerState) -> tuple[str, ...]:
    """Which matrices a layer has; an embedding has none on the input side."""
    return ("psi", "q_psi") if layer.q_phi is None else SQUARES
