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
