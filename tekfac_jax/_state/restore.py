"""Saves a state without its factors, and restores a saved one."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jax.tree.unflatten`, `jax.device_put` and others untyped.

from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from tekfac_jax._layers.types import OptState, PyTree, TreeDef
from tekfac_jax._state.compare import (
    difference,
    differing_paths,
    is_integer,
    is_known,
    largest,
    not_a_state,
    too_new,
)
from tekfac_jax._state.layout import ADDED, ScaleByTekfacState, is_layer_state
from tekfac_jax._state.recognise import Name, states_by_name, with_names

_FACTORS = ("phi", "psi")
Leaves: TypeAlias = dict[Name, PyTree]  # the leaves of a state, by name


def without_factors(opt_state: OptState) -> OptState:
    """A state without Φ and Ψ, about half its size: for saving, not for further steps.

    Args:
        opt_state: state of any optax transformation that contains one of ours, or a train state.

    Returns:
        The same state with `phi` and `psi` of each layer None. `restore_state` with
        ``factors=False`` restores it.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.memory_usage(tekfac.without_factors(opt_state))
        {'params': {'factors': 0, 'eigenbasis': 180, 'rescaling': 72}}
    """

    def drop(node: PyTree) -> PyTree:
        return node._replace(phi=None, psi=None) if is_layer_state(node) else node

    return jax.tree.map(drop, opt_state, is_leaf=is_layer_state)


def restore_state(saved: OptState, opt_state: OptState, *, factors: bool = True) -> OptState:
    """Puts a saved state in the place of a fresh one; converts states of earlier versions.

    Checkpoint libraries that get ``tx.init(params)`` as a target restore a state by themselves, to
    the bit. This function does what they cannot: it says in a sentence what does not fit, reads
    states saved by earlier versions of this library, and works without the factors. Leaves are
    matched by name, so nested dicts will do as well: what `orbax.checkpoint` restores without a
    target, `flax.serialization.to_state_dict` returns, or `flax.serialization.msgpack_restore`
    reads.

    Args:
        saved: the saved state, as such or as nested dicts and lists of arrays.
        opt_state: what ``tx.init(params)`` returns for the optimizer that will continue, or a
            train state that contains it, if `saved` is one. Arrays, not only shapes; the result is
            placed on their devices.
        factors: whether Φ and Ψ are restored. If False (with `without_factors`, or any other
            state), they are rebuilt from the next statistics, which `stats_due` asks for, and the
            saved eigenbasis stays until its next refresh; `check_state` says so.

    Returns:
        The saved values in the structure of `opt_state`.

    Raises:
        ValueError: `saved` belongs to other layers, other options (those that `check_state`
            compares) or a later version, or has missing or extra arrays; or `opt_state` contains
            no state of ours.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> from flax import serialization
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> tx = tekfac.tekfac(0.1, layers)
        >>> saved = serialization.to_bytes(tx.init(params))
        >>> saved = serialization.msgpack_restore(saved)
        >>> tekfac.check_state(tekfac.restore_state(saved, tx.init(params)), layers)
        ''
    """
    ours = _ours(opt_state)
    if not ours:
        raise ValueError(
            "opt_state= has no state of scale_by_tekfac or a sibling "
            f"({type(opt_state).__name__}); pass what tx.init(params) returns"
        )

    # Leaves are matched by name; what the saved state cannot have is taken from the fresh one.
    found = dict(with_names(saved, "saved="))
    fresh = dict(with_names(opt_state, "opt_state="))
    for root, state in ours.items():
        _check_fresh(state)
        _check_layers(found, fresh, root)
        found = _converted(found, fresh, root)
        found = _with_factors(found, fresh, root) if factors else _fresh_factors(found, fresh, root)
    _check_names(found, fresh)
    _check_arrays(found, fresh)

    # Only a whole state can be compared with the one that the optimizer expects.
    structure = cast(TreeDef, jax.tree.structure(opt_state))
    restored = jax.tree.unflatten(structure, [found[name] for name in fresh])
    for root, state in _ours(restored).items():
        if broken := not_a_state(state):
            raise ValueError(f"saved= cannot be read: {broken}")
        if sentence := difference(state, ours[root]):
            raise ValueError(f"saved= does not fit the optimizer: {sentence}")
    placed = [_placed(name, found[name], like) for name, like in fresh.items()]
    return jax.tree.unflatten(structure, placed)


def _ours(tree: OptState) -> dict[Name, ScaleByTekfacState]:
    return states_by_name(tree, ScaleByTekfacState, "opt_state=")


def _under(names: Leaves, root: Name) -> list[Name]:
    """The names below a root."""
    return [name for name in names if name[: len(root)] == root]


def _check_fresh(state: ScaleByTekfacState) -> None:
    if broken := not_a_state(state):
        raise ValueError(f"opt_state= must be what tx.init(params) returns: {broken}")
    if not all(map(is_known, jax.tree.leaves(state))):
        raise ValueError(
            "opt_state= must hold arrays, not shapes: pass tx.init(params) itself, outside of jit"
        )


def _check_layers(found: Leaves, fresh: Leaves, root: Name) -> None:
    root = (*root, "layers")
    paths, expected = (
        {name[len(root)] for name in _under(leaves, root) if len(name) > len(root)}
        for leaves in (found, fresh)
    )
    if sentence := differing_paths(paths, expected):
        raise ValueError(f"saved= does not fit the optimizer: {sentence}")


def _converted(found: Leaves, fresh: Leaves, root: Name) -> Leaves:
    """The saved leaves, with fresh ones for those that later versions of the layout added.

    Version 0 did not record the options; they are assumed to be those of the given optimizer.
    """
    saved = found.get((*root, "meaning", "version"), 0)
    if not (is_integer(saved) and is_known(saved) and np.size(saved)):
        raise ValueError(
            f"saved= cannot be read: its layout version is {saved!r}, which is not a number"
        )
    version = int(largest(saved))
    if sentence := too_new(version):
        raise ValueError(f"saved= cannot be read: {sentence}")

    def is_added(name: Name) -> bool:
        field, *more = name[len(root) :]
        return ADDED.get(more[1] if field == "layers" else field, 0) > version

    return found | {name: fresh[name] for name in _under(fresh, root) if is_added(name)}


def _is_factor(name: Name) -> bool:
    return name[-1] in _FACTORS


def _with_factors(found: Leaves, fresh: Leaves, root: Name) -> Leaves:
    """The saved leaves; raises if factors are missing."""
    missing = [name for name in _under(fresh, root) if _is_factor(name) and name not in found]
    if missing:
        raise ValueError(
            f"saved= has no factors for layer {missing[0][-2]!r}; with factors=False they are "
            "rebuilt from the next statistics"
        )
    return found


def _fresh_factors(found: Leaves, fresh: Leaves, root: Name) -> Leaves:
    """Zeros for the factors and their weight, so that the next statistics are an assignment."""
    zeroed = [n for n in _under(fresh, root) if _is_factor(n) or n[-1] == "factor_weight"]
    return found | {name: jnp.zeros_like(fresh[name]) for name in zeroed}


def _check_names(found: Leaves, fresh: Leaves) -> None:
    missing, extra = (
        sorted("/".join(name) for name in one.keys() - other.keys())
        for one, other in ((fresh, found), (found, fresh))
    )
    if missing or extra:
        raise ValueError(
            f"saved= does not fit the optimizer: it lacks {missing[:3]} and has {extra[:3]}, which "
            f"the optimizer does not have ({len(missing)} and {len(extra)} in total)."
        )


def _check_arrays(found: Leaves, fresh: Leaves) -> None:
    for name, like in fresh.items():
        value = found[name]
        if hasattr(like, "dtype") and not (hasattr(value, "dtype") and is_known(value)):
            raise ValueError(
                f"saved= does not fit the optimizer: {'/'.join(name)} is a {type(value).__name__} "
                "instead of an array with values"
            )


def _placed(name: Name, value: PyTree, like: PyTree) -> PyTree:
    """The saved array on the devices of the fresh one."""
    if not hasattr(like, "dtype"):  # a Python number
        return value
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(
            f"saved= does not fit the optimizer: {'/'.join(name)} is {value.dtype}{value.shape} "
            f"in saved= and {like.dtype}{like.shape} in opt_state="
        )
    return jax.device_put(value, like.sharding) if isinstance(like, jax.Array) else value
