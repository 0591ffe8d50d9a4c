"""Layers of equal shapes together: on GPU one batched operation replaces many small ones."""

# pyright: reportUnknownMemberType=false
# jaxlib has no types for the structure of a pytree.

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar, cast

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.chunks import on_cpu
from tekfac_jax._layers.types import PyTree

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def batches_equal_shapes() -> bool:
    """Whether batching pays: on CPU, one after another is as fast and compiles sooner."""
    return not on_cpu()


def by_shape(function: Callable[..., T], arguments: Mapping[K, tuple[PyTree, ...]]) -> dict[K, T]:
    """`function(*arguments)` for each key; where batching pays, one call per set of equal shapes.

    Args:
        function: a pure function of arrays that accepts further leading axes.
        arguments: pytrees of arrays. Those of equal structure, shapes and dtypes are batched.

    Returns:
        The results by key, in the order of `arguments`.
    """
    groups: dict[Hashable, list[K]] = {}
    for key, values in arguments.items():
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(values))
        structure = cast(Hashable, jax.tree.structure(values))
        groups.setdefault((structure, shapes) if batches_equal_shapes() else key, []).append(key)
    found: dict[K, T] = {}
    for keys in groups.values():
        if len(keys) == 1:
            found[keys[0]] = function(*arguments[keys[0]])
            continue
        batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(arguments[k] for k in keys))
        results = function(*batch)
        for index, key in enumerate(keys):
            found[key] = jax.tree.map(operator.itemgetter(index), results)
    return {key: found[key] for key in arguments}
