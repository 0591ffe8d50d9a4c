"""Names of layers and parameters: JAX key paths as strings such as ``block/Dense_0/kernel``."""

# pyright: reportUnknownMemberType=false
# JAX leaves the key paths that its functions return partially untyped.

from collections.abc import Callable
from typing import cast

import jax

from tekfac_jax._layers.types import Key, KeyPath, PyTree, TreeDef

_PARAMETERS = ("kernel", "bias", "embedding", "scale")  # what Flax calls a layer's parameters


def join_path(keys: KeyPath) -> str:
    """Joins a JAX key path with ``/``; the empty path (a bare layer as root) is ``~``."""

    def name(key: Key) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    return "/".join(map(name, unboxed(keys))) or "~"


def unboxed(keys: KeyPath) -> KeyPath:
    """A key path without the box at its end: `nn.Partitioned`, or an nnx variable."""
    return keys[:-1] if keys and getattr(keys[-1], "name", None) == "value" else keys


def parameter_path(layer_path: str, name: str) -> str:
    """Path of the kernel or bias of a layer."""
    return name if layer_path == "~" else f"{layer_path}/{name}"


def layer_path(key_path: KeyPath) -> str | None:
    """The path of the layer to which a parameter at that key path would belong, by its name."""
    *home, name = unboxed(key_path) or ("",)
    return join_path(tuple(home)) if join_path((name,)) in _PARAMETERS else None


def flattened(
    tree: PyTree, what: str, is_leaf: Callable[[PyTree], bool] | None = None
) -> tuple[list[tuple[KeyPath, PyTree]], TreeDef]:
    """`jax.tree_util.tree_flatten_with_path`; raises a ValueError if JAX cannot flatten `tree`."""
    try:
        found = cast(
            tuple[list[tuple[KeyPath, PyTree]], TreeDef],
            jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf),
        )
    except (TypeError, ValueError) as error:  # such as keys that cannot be sorted
        raise ValueError(f"{what} is not a pytree that JAX can flatten: {error}") from error
    return found
