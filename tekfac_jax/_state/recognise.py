"""Finds our states inside any optax state, however deep."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from tekfac_jax._layers.types import OptState, PyTree
from tekfac_jax._state.compare import no_factors, not_a_state
from tekfac_jax._state.folding import unfolded
from tekfac_jax._state.layout import LayerState, ScaleByTekfacState

S = TypeVar("S")
Name = tuple[str, ...]  # of a leaf: keys, fields and indices from the root


def layer_states(opt_state: OptState) -> dict[str, LayerState]:
    """The state of each layer; of several transformations all of them together."""
    states: dict[str, LayerState] = {}
    for state in find_states(opt_state, ScaleByTekfacState):
        states |= state.layers
    return states


def whole_layers(opt_state: OptState) -> dict[str, LayerState]:
    """The layers with their matrices as such; raises if factors are left out."""
    states = layer_states(opt_state)
    if missing := next(filter(None, (no_factors(p, layer) for p, layer in states.items())), ""):
        raise ValueError(missing)
    return {path: unfolded(layer) for path, layer in states.items()}


def find_states(opt_state: OptState, kind: type[S]) -> list[S]:
    """As `search`; raises if there is none, or if one of ours is broken."""
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
    found = list(states_by_name(opt_state, kind).values())
    return jax.tree.map(lambda x: x.__jax_array__() if _refers(x) else x, found, is_leaf=_refers)


def states_by_name(tree: OptState, kind: type[S]) -> dict[Name, S]:
    """All states of that type in a pytree, and where they are."""
    # A clip's state contains the state that it wraps: stop only at the kind that is looked for.
    nodes = with_names(tree, lambda node: isinstance(node, kind))
    return {name: node for name, node in nodes if isinstance(node, kind)}


def with_names(
    tree: PyTree, is_leaf: Callable[[object], bool] | None = None
) -> list[tuple[Name, Any]]:
    """Leaves with names that do not depend on whether a node is a NamedTuple, a list or a dict."""
    try:
        nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    except ValueError as error:  # keys of several types cannot be sorted
        raise ValueError(
            f"an optimizer state must be a pytree whose dicts have keys of one type: {error}"
        ) from error
    return [
        (tuple(jax.tree_util.keystr((key,), simple=True) for key in path), node)
        for path, node in nodes
    ]


def _refers(node: Any) -> bool:
    """Whether an array is kept in an object, as `nnx.Optimizer` keeps those of its state."""
    return hasattr(node, "__jax_array__") and not isinstance(node, jax.Array)
