"""What is saved of a state, and how it is taken up again."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tekfac_jax._layers.types import OptState, PyTree
from tekfac_jax._state.compare import (
    difference,
    differing_paths,
    is_integer,
    is_known,
    largest,
    not_a_state,
    too_new,
)
from tekfac_jax._state.layout import ADDED, LayerState, ScaleByTekfacState
from tekfac_jax._state.recognise import Name, states_by_name, with_names

_FACTORS = ("phi", "psi")


def without_factors(opt_state: Any) -> Any:
    """A state without Φ and Ψ, about half of its bytes: to be saved, not to be used as it is.

    Args:
        opt_state: state of any optax transformation that contains one of ours, or a train state.

    Returns:
        The same with None for `phi` and `psi` of each layer. `restore_state` with
        ``factors=False`` takes it up again.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.memory_usage(tekfac.without_factors(opt_state))
        {'params': {'factors': 0, 'eigenbasis': 180, 'rescaling': 72}}
    """

    def drop(node: Any) -> Any:
        return node._replace(phi=None, psi=None) if isinstance(node, LayerState) else node

    return jax.tree.map(drop, opt_state, is_leaf=lambda node: isinstance(node, LayerState))


def restore_state(saved: Any, opt_state: Any, *, factors: bool = True) -> Any:
    """What was saved, in the place of a fresh state; states of earlier versions are brought up.

    Checkpoint libraries that are given ``tx.init(params)`` as a target restore a state by
    themselves, to the bit. This function is for what they cannot do: it says in a sentence what
    does not fit, reads states that an earlier version of this library has saved, and does without
    the factors. Leaves are matched by name, so that nested dicts will do as well: what
    `orbax.checkpoint` restores without a target, `flax.serialization.to_state_dict` returns and
    `flax.serialization.msgpack_restore` reads.

    Args:
        saved: the state that was saved, as such or as nested dicts and lists of arrays.
        opt_state: what ``tx.init(params)`` returns of the optimizer that is to go on; or a train
            state that contains it, if `saved` is one. Arrays, not shapes alone; the result lies
            on the devices where these lie.
        factors: whether Φ and Ψ are taken over. Without them (`without_factors`, or any other
            state) they are built anew from the next statistics, `stats_due` asks for these, and
            the eigenbasis stays as it was saved until its next refresh; `check_state` says so.

    Returns:
        The saved numbers in the structure of `opt_state`.

    Raises:
        ValueError: `saved` is of other layers, of other options (as far as `check_state` sees
            them), of a later version, or lacks arrays, or has others; `opt_state` has no state of
            ours.

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
    found = _leaves_by_name(saved)
    fresh = _leaves_by_name(opt_state)
    for root, state in ours.items():
        _check_place(state)
        _check_layers(found, fresh, root)
        found = _brought_up(found, fresh, root)
        found = _factors_of(found, fresh, root) if factors else _fresh_factors(found, fresh, root)
    _check_names(found, fresh)
    _check_arrays(found, fresh)
    restored = jax.tree.unflatten(jax.tree.structure(opt_state), [found[name] for name in fresh])
    for root, state in _ours(restored).items():
        if broken := not_a_state(state):
            raise ValueError(f"saved= cannot be read: {broken}")
        if sentence := difference(state, ours[root]):
            raise ValueError(f"saved= does not fit the optimizer: {sentence}")
    return jax.tree.unflatten(
        jax.tree.structure(opt_state),
        [_placed(name, found[name], like) for name, like in fresh.items()],
    )


def _leaves_by_name(tree: PyTree) -> dict[Name, Any]:
    return dict(with_names(tree))


def _ours(tree: OptState) -> dict[Name, ScaleByTekfacState]:
    return states_by_name(tree, ScaleByTekfacState)


def _under(names: Mapping[Name, Any], root: Name) -> list[Name]:
    return [name for name in names if name[: len(root)] == root]


def _check_place(state: ScaleByTekfacState) -> None:
    if broken := not_a_state(state):
        raise ValueError(f"opt_state= must be what tx.init(params) returns: {broken}")
    if not all(map(is_known, jax.tree.leaves(state))):
        raise ValueError(
            "opt_state= must hold arrays, not shapes: pass tx.init(params) itself, outside of jit"
        )


def _check_layers(found: Mapping[Name, Any], fresh: Mapping[Name, Any], root: Name) -> None:
    root = (*root, "layers")
    paths, expected = (
        {name[len(root)] for name in _under(leaves, root) if len(name) > len(root)}
        for leaves in (found, fresh)
    )
    if sentence := differing_paths(paths, expected):
        raise ValueError(f"saved= does not fit the optimizer: {sentence}")


def _brought_up(found: dict[Name, Any], fresh: Mapping[Name, Any], root: Name) -> dict[Name, Any]:
    """The saved leaves, and fresh ones for what later versions of the layout have added.

    Version 0 did not say whose state it was; it is taken for one of the optimizer given.
    """
    saved = found.get((*root, "meaning", "version"), 0)
    if not (is_integer(saved) and is_known(saved) and np.size(saved)):
        raise ValueError(
            f"saved= cannot be read: the version of its layout is {saved!r}, no number"
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


def _factors_of(found: dict[Name, Any], fresh: Mapping[Name, Any], root: Name) -> dict[Name, Any]:
    missing = [name for name in _under(fresh, root) if _is_factor(name) and name not in found]
    if missing:
        raise ValueError(
            f"saved= has no factors of layer {missing[0][-2]!r}; with factors=False they are built "
            "anew from the next statistics"
        )
    return found


def _fresh_factors(
    found: dict[Name, Any], fresh: Mapping[Name, Any], root: Name
) -> dict[Name, Any]:
    """No factors, and nothing averaged: the next statistics are an assignment."""
    anew = [n for n in _under(fresh, root) if _is_factor(n) or n[-1] == "factor_weight"]
    return found | {name: jnp.zeros_like(fresh[name]) for name in anew}


def _check_names(found: Mapping[Name, Any], fresh: Mapping[Name, Any]) -> None:
    missing, extra = (
        sorted("/".join(name) for name in one.keys() - other.keys())
        for one, other in ((fresh, found), (found, fresh))
    )
    if missing or extra:
        raise ValueError(
            f"saved= does not fit the optimizer: it has no {missing[:3]} and has {extra[:3]}, "
            f"which the optimizer has not ({len(missing)} and {len(extra)} in all)."
        )


def _check_arrays(found: Mapping[Name, Any], fresh: Mapping[Name, Any]) -> None:
    for name, like in fresh.items():
        value = found[name]
        if hasattr(like, "dtype") and not (hasattr(value, "dtype") and is_known(value)):
            raise ValueError(
                f"saved= does not fit the optimizer: {'/'.join(name)} is a {type(value).__name__} "
                "instead of an array with values"
            )


def _placed(name: Name, value: Any, like: Any) -> Any:
    """The saved array, where the fresh one lies."""
    if not hasattr(like, "dtype"):  # a number of Python's
        return value
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(
            f"saved= does not fit the optimizer: {'/'.join(name)} is {value.dtype}{value.shape} "
            f"there and {like.dtype}{like.shape} here"
        )
    return jax.device_put(value, like.sharding) if isinstance(like, jax.Array) else value
