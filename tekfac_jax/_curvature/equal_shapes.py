"""Layers of equal shapes together: on GPU one batched operation instead of many small ones."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.chunks import on_cpu

_Key = TypeVar("_Key")


def batches_equal_shapes() -> bool:
    """On CPU one after another is as fast, and compiles sooner."""
    return not on_cpu()


def by_shape(
    function: Callable[..., Any], arguments: Mapping[_Key, tuple[Any, ...]]
) -> dict[_Key, Any]:
    """`function(*arguments)` for each key; where it pays, one call for those of equal shapes.

    Args:
        function: pure, of arrays, and indifferent to further leading axes.
        arguments: pytrees of arrays. Those of equal structure, shapes and dtypes are stacked.

    Returns:
        The results by key, in the order of `arguments`.
    """
    groups: dict[Any, list[_Key]] = {}
    for key, values in arguments.items():
        leaves, structure = jax.tree.flatten(values)
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        groups.setdefault((structure, shapes) if batches_equal_shapes() else key, []).append(key)
    found: dict[_Key, Any] = {}
    for keys in groups.values():
        if len(keys) == 1:
            found[keys[0]] = function(*arguments[keys[0]])
            continue
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(arguments[k] for k in keys))
        results = function(*stacked)
        for index, key in enumerate(keys):
            found[key] = jax.tree.map(lambda leaf, index=index: leaf[index], results)
    return {key: found[key] for key in arguments}
