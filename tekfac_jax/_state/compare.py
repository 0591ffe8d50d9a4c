"""Compares states: what is no state of ours, and how one differs from another, in a sentence."""

from collections.abc import Collection, Iterator, Mapping

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from tekfac_jax._layers.types import OptState
from tekfac_jax._state.family import member_of
from tekfac_jax._state.folding import is_folded
from tekfac_jax._state.layout import STATE_VERSION, LayerState, ScaleByTekfacState, StateKind


def is_known(x: object) -> bool:
    """Whether an array has values: under `jit` and of `jax.eval_shape` it has none."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | int) and not isinstance(x, Tracer)


def largest(x: ArrayLike) -> int | float:
    """The largest number of an array that is known.

    By NumPy: under a trace JAX would make an unknown one even of an array that has values.
    """
    return np.max(np.asarray(x)).item()


def is_integer(x: object) -> bool:
    """Whether a number or an array, with or without values, is of integers or booleans."""
    return str(getattr(x, "dtype", type(x).__name__)).startswith(("int", "bool"))


def version_of(meaning: StateKind | None) -> int:
    """Version of a state's layout; states of version 0 did not say so."""
    return 0 if meaning is None else int(largest(meaning.version))


def check_state_fits(found: OptState, expected: ScaleByTekfacState) -> None:
    """Raises if an optimizer is given the state of another; `expected` may be shapes."""
    if broken := not_a_state(found):
        raise ValueError(f"state= must be what init or the update before returned: {broken}")
    if sentence := difference(found, expected):
        raise ValueError(f"state= does not fit this optimizer: {sentence}")
    if not all(isinstance(x, jax.Array | np.ndarray | np.generic) for x in jax.tree.leaves(found)):
        raise ValueError("state= must hold arrays; jax.ShapeDtypeStruct has no numbers")


def not_a_state(found: OptState) -> str:
    """Says what was put in the place of a state of ours, or of a part of it."""
    if not isinstance(found, ScaleByTekfacState):
        return f"a {type(found).__name__} is no ScaleByTekfacState."
    if not isinstance(found.layers, Mapping):
        return f"its layers are a {type(found.layers).__name__} instead of a dict of LayerState."
    for path, layer in found.layers.items():
        if not isinstance(layer, LayerState):
            return f"its layer {path!r} is a {type(layer).__name__} instead of a LayerState."
        if broken := _not_a_layer(path, layer):
            return broken
    if not isinstance(found.meaning, StateKind | None):
        return f"its meaning is a {type(found.meaning).__name__} instead of a StateKind."
    for name, value in (found.meaning or _UNSAID)._asdict().items():
        if not is_integer(value) or 0 in np.shape(value):
            return f"{name!r} of its meaning is {value!r} instead of a number or a boolean."
    return ""


_UNSAID = StateKind(0, False, False, False, False)  # what a state of version 0 means

# What may be None: of an embedding, without factors, and in a state of version 0.
_OPTIONAL = {"q_phi", "phi", "psi", "failed_in_a_row", "fallen_back"}


def _not_a_layer(path: str, layer: LayerState) -> str:
    for name, value in layer._asdict().items():
        is_left_out = value is None and name in _OPTIONAL
        if not (is_left_out or (hasattr(value, "shape") and hasattr(value, "dtype"))):
            return f"{name!r} of layer {path!r} is a {type(value).__name__} instead of an array."
    is_matrix = {"theta": True, "q_psi": layer.q_psi.ndim != 1}  # or folded
    is_matrix["q_phi"] = layer.q_phi is not None and is_matrix["q_psi"]
    for name, needed in is_matrix.items():
        if needed and getattr(layer, name).ndim < 2:
            shape = getattr(layer, name).shape
            return f"{name!r} of layer {path!r} has shape {shape} instead of that of a matrix."
    return ""


def difference(found: ScaleByTekfacState, expected: ScaleByTekfacState) -> str:
    """The first difference between a state that was found and the one an optimizer expects.

    Values are compared where both have them, shapes and dtypes always; `expected` may hold
    `jax.ShapeDtypeStruct`.
    """
    return (
        _of_scalars(found, expected)
        or of_version(found)
        or _of_paths(found, expected)
        or _of_meaning(found.meaning, expected.meaning)
        or next(filter(None, _of_each_layer(found, expected)), "")
    )


def differing_paths(found: Collection[str], expected: Collection[str]) -> str:
    """The same for the paths of layers alone."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if not found:
        return "There are no layers where they should be: is it the state of another optimizer?"
    if missing or extra:
        return f"The state has no layers {missing} and has {extra}, which the network has not."
    return ""


def differing_dimensions(path: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The same for a layer's (*lead, in[+1], out)."""
    if found == expected:
        return ""
    return (
        f"Layer {path!r} has in and out dimension {found} in the state and {expected} in the "
        "network."
    )


def dimensions(layer: LayerState) -> tuple[int, ...]:
    """(*lead, in[+1], out)."""
    if is_folded(layer, "q_psi"):
        return tuple(layer.theta.shape)
    rows = layer.theta.shape[-2] if layer.q_phi is None else layer.q_phi.shape[-2]
    return (*layer.theta.shape[:-2], rows, layer.q_psi.shape[-2])


def too_new(version: int) -> str:
    """Says that a later version of the library has written a state."""
    if version <= STATE_VERSION:
        return ""
    return (
        f"The state is of layout version {version}, and this version of tekfac_jax reads versions "
        f"up to {STATE_VERSION}: update tekfac_jax."
    )


def of_version(found: ScaleByTekfacState) -> str:
    """Says whether another version of the layout is found."""
    without = any(layer.failed_in_a_row is None for layer in found.layers.values())
    if found.meaning is None or without:
        return (
            f"The state is of layout version 0, of an earlier tekfac_jax, and {STATE_VERSION} is "
            "expected: restore_state brings it up to date."
        )
    return too_new(version_of(found.meaning)) if is_known(found.meaning.version) else ""


def _of_paths(found: ScaleByTekfacState, expected: ScaleByTekfacState) -> str:
    return differing_paths(found.layers, expected.layers)


def _of_meaning(found: StateKind | None, expected: StateKind | None) -> str:
    if found is None or expected is None or not all(map(is_known, (*found, *expected))):
        return ""
    if describe(found) == describe(expected):
        return ""
    return (
        f"The state is that of {describe(found)}, and the optimizer is {describe(expected)}: the "
        "shapes are the same, the numbers are not."
    )


def describe(kind: StateKind) -> str:
    """The member of the family and the options that give the averages their meaning."""
    plain, measured, location, running = (bool(largest(x)) for x in kind[1:])
    options = ['factors="location"'] * (location and not plain)
    options += ['rescaling="running"'] * (running and measured)
    name = member_of(plain, measured).name
    return f"{name} with {' and '.join(options)}" if options else name


def _of_scalars(found: ScaleByTekfacState, expected: ScaleByTekfacState) -> str:
    for name in ("count", "due"):
        kinds = [_kind(getattr(state, name)) for state in (found, expected)]
        if kinds[0] != kinds[1]:
            return f"{name!r} is {kinds[0]} in the state and {kinds[1]} in the optimizer."
    return ""


def _kind(x: object) -> str:
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return f"{x.dtype}{list(x.shape)}"
    return f"a {type(x).__name__}"


def _of_each_layer(found: ScaleByTekfacState, expected: ScaleByTekfacState) -> Iterator[str]:
    for path, layer in expected.layers.items():
        yield _of_layer(path, found.layers[path], layer)


def no_factors(path: str, found: LayerState) -> str:
    """Says whether Φ and Ψ were left out, by `without_factors`."""
    if found.phi is not None and found.psi is not None:
        return ""
    return (
        f"Layer {path!r} has no factors in the state: restore_state(..., factors=False) "
        "has them built anew."
    )


def _of_layer(path: str, found: LayerState, expected: LayerState) -> str:
    if missing := no_factors(path, found):
        return missing
    if is_folded(found, "psi") != is_folded(expected, "psi"):
        state, optimizer = ("with", "without") if is_folded(found, "psi") else ("without", "with")
        return (
            f"Layer {path!r} is {state} shard_state in the state and {optimizer} in the optimizer."
        )
    sizes = differing_dimensions(path, dimensions(found), dimensions(expected))
    if sizes:
        return sizes
    kept, wanted = tuple(found.theta.shape[-2:]), tuple(expected.theta.shape[-2:])
    if kept != wanted:
        return (
            f"Layer {path!r} keeps {kept} eigenvectors of its two sides in the state and {wanted} "
            "in the optimizer: give it the basis_rank and max_dim of before."
        )
    return _of_arrays(path, found, expected)


def _of_arrays(path: str, found: LayerState, expected: LayerState) -> str:
    for name in LayerState._fields:
        x, y = getattr(found, name), getattr(expected, name)
        if (x is None) != (y is None) or (x is not None and tuple(x.shape) != tuple(y.shape)):
            return f"{name!r} of layer {path!r} has another shape in the state than in the network."
        if x is not None and x.dtype != y.dtype:
            return (
                f"{name!r} of layer {path!r} is {x.dtype} in the state and {y.dtype} in the "
                "optimizer: give it the factor_dtype of before."
            )
    return ""
