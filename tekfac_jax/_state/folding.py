"""Matrices folded into one axis that any usual number of devices divides evenly.

A 577×577 matrix has no axis that could be divided among eight devices. Folded, filled up with
zeros, it has one, and the same one for every number of devices: a checkpoint does not depend on
it.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tekfac_jax._state.layout import LayerState

# 2^9 · 3 · 5: among its divisors are all powers of two up to 512, and 1 to 6, 8, 10, 12, 15, ...
FOLD = 7680


def folded_size(shape: Sequence[int]) -> int:
    """Numbers of a folded array: the next multiple of `FOLD`."""
    return -(-math.prod(shape) // FOLD) * FOLD


def fold(x: jax.Array) -> jax.Array:
    """An array as one axis, filled up with zeros."""
    return jnp.pad(x.ravel(), (0, folded_size(x.shape) - x.size))


def unfold(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The array of that shape; one that is not folded as it is."""
    if x.shape == tuple(shape):
        return x
    return _on_every_device(x)[: math.prod(shape)].reshape(shape)


def _on_every_device(x: jax.Array) -> jax.Array:
    """Brings the parts together where the mesh's axes are explicit; else the compiler does."""
    sharding = jax.typeof(x).sharding
    if any(axis is not None for axis in sharding.spec):
        return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


# The square matrices of a layer, the bulk of its state; they may be folded (`_folding`).
SQUARES = ("phi", "psi", "q_phi", "q_psi")


def is_folded(layer: LayerState, name: str) -> bool:
    """Whether that one of `SQUARES` is folded. Of an embedding Φ is a vector, and never is."""
    return name in _square_names(layer) and getattr(layer, name).ndim == 1


def _square_shape(layer: LayerState, name: str) -> tuple[int, ...]:
    """What Θ, which is never folded, says of a matrix's shape."""
    *lead, i, o = layer.theta.shape
    dim = i if name.endswith("phi") else o
    return (*lead, dim, dim)


def unfolded(layer: LayerState) -> LayerState:
    """The layer with all its matrices as such."""
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
    return ("psi", "q_psi") if layer.q_phi is None else SQUARES
