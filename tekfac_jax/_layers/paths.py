"""TODO: _layers/paths"""

from collections.abc import Callable
from typing import Any

import jax


def join_path(keys: tuple[Any, ...]) -> str:
    """Joins a JAX key path with ``/``; the empty path (a bare layer as root) is ``~``."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    return "/".join(map(name, unboxed(keys))) or "~"


def unboxed(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without the box around its end: `nn.Partitioned`, or a variable of nnx."""
    return keys[:-1] if keys and getattr(keys[-1], "name", None) == "value" else keys


def parameter_path(layer_path: str, name: str) -> str:
    """Path of the kernel or bias of a layer."""
    return name if layer_path == "~" else f"{layer_path}/{name}"


def layer_path(key_path: tuple[Any, ...]) -> str | None:
    """The path of the layer whose kernel or bias stands at that key path, were there one."""
    *home, name = unboxed(key_path) or ("",)
    names = ("kernel", "bias", "embedding", "scale")
    return join_path(tuple(home)) if join_path((name,)) in names else None


def flattened(
    tree: Any, what: str, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[Any, Any]], Any]:
    """`jax.tree_util.tree_flatten_with_path`; raises a ValueError for what is no pytree."""
    try:
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    except (TypeError, ValueError) as error:  # keys that cannot be sorted, for one
        raise ValueError(f"{what} is no pytree that JAX can flatten: {error}") from error
