"""Finds our states inside any optax state, however deep."""

# pyright: reportUnknownMemberType=false
# JAX leaves the key paths that its functions return partially untyped.

from collections.abc import Callable
from typing import Protocol, TypeGuard, TypeVar, cast

import jax

from tekfac_jax._layers.types import KeyPath, OptState, PyTree
from tekfac_jax._state.compare import first_of, no_factors, not_a_state
from tekfac_jax._state.folding import unfolded
from tekfac_jax._state.layout import LayerState, ScaleByTekfacState

S = TypeVar("S")
Name = tuple[str, ...]  # a leaf's keys, fields and indices, from the root


def layer_states(opt_state: OptState) -> dict[str, LayerState]:
    """The state of each layer, over all transformations of the family."""
    states: dict[str, LayerState] = {}
    for state in find_states(opt_state, ScaleByTekfacState):
        states |= state.layers
    return states


def whole_layers(opt_state: OptState) -> dict[str, LayerState]:
    """The layers with their matrices unfolded; raises if factors are missing."""
    states = layer_states(opt_state)
    if missing := first_of(no_factors(path, layer) for path, layer in states.items()):
        raise ValueError(missing)
    return {path: unfolded(layer) for path, layer in states.items()}


def find_states(opt_state: OptState, kind: type[S]) -> list[S]:
    """Like `search`, but raises if there is none, or if one of ours is broken."""
    found = search(opt_state, kind)
    if not found:
        raise ValueError(
            "there is no state of scale_by_tekfac or a sibling in this optimizer state "
            f"({type(opt_state).__name__}); pass what tx.init or tx.update returned"
        )
    for state in found:
        if isinstance(state, ScaleByTekfacState) and (broken := not_a_state(state)):
            raise ValueError(broken)
    return found


def search(opt_state: OptState, kind: type[S]) -> list[S]:
    """All states of that type in an optax state, however deep."""

    def as_array(x: PyTree) -> PyTree:
        return x.__jax_array__() if _refers(x) else x

    found = list(states_by_name(opt_state, kind).values())
    return jax.tree.map(as_array, found, is_leaf=_refers)


def states_by_name(
    tree: OptState, kind: type[S], what: str = "an optimizer state"
) -> dict[Name, S]:
    """All states of that type in a pytree, by name; `what` is the pytree's name in an error."""
    # The state of a clip contains the state that it wraps: stop only at the kind in question.
    nodes = with_names(tree, what, lambda node: isinstance(node, kind))
    return {name: node for name, node in nodes if isinstance(node, kind)}


def with_names(
    tree: PyTree, what: str, is_leaf: Callable[[object], bool] | None = None
) -> list[tuple[Name, PyTree]]:
    """Leaves with names that do not depend on whether a node is a NamedTuple, a list or a dict."""
    try:
        nodes = cast(
            list[tuple[KeyPath, PyTree]],
            jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf),
        )
    except ValueError as error:  # keys of several types cannot be sorted
        raise ValueError(
            f"{what} must be a pytree whose dicts have keys of one type: {error}"
        ) from error
    return [
        (tuple(jax.tree_util.keystr((key,), simple=True) for key in path), node)
        for path, node in nodes
    ]


class _Reference(Protocol):
    """An object that holds an array."""

    def __jax_array__(self) -> jax.Array: ...


def _refers(node: object) -> TypeGuard[_Reference]:
    """Whether an object holds an array, as in the state of an `nnx.Optimizer`."""
    return hasattr(node, "__jax_array__") and not isinstance(node, jax.Array)
