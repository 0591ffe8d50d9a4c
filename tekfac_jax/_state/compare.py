"""Compares states: says in a sentence what is not a state of ours, or how two states differ."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeGuard

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from tekfac_jax._layers.types import OptState, Shaped
from tekfac_jax._state.family import member_of
from tekfac_jax._state.folding import is_folded
from tekfac_jax._state.layout import STATE_VERSION, LayerState, ScaleByTekfacState, StateKind


def is_known(x: object) -> bool:
    """Whether an array has values: under `jit` or from `jax.eval_shape` it has none."""
    return (is_array(x) or isinstance(x, int)) and not isinstance(x, Tracer)


def is_array(x: object) -> TypeGuard[jax.Array]:
    """Whether `x` is an array of JAX or NumPy, or a NumPy scalar."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _has_shape(x: object) -> TypeGuard[Shaped]:
    """Whether `x` has the shape and dtype of an array, with or without values."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def first_of(sentences: Iterable[str]) -> str:
    """The first sentence that is not empty; the empty string if there is none."""
    return next(filter(None, sentences), "")


def largest(x: ArrayLike) -> int | float:
    """The largest number of an array that has values.

    Uses NumPy: under a trace JAX would return a tracer even for an array that has values.
    """
    return np.max(np.asarray(x)).item()


def is_integer(x: object) -> bool:
    """Whether a number or an array, with or without values, has an integer or boolean type."""
    return str(getattr(x, "dtype", type(x).__name__)).startswith(("int", "bool"))


def version_of(meaning: StateKind | None) -> int:
    """Version of a state's layout; states of version 0 did not record it."""
    return 0 if meaning is None else int(largest(meaning.version))


def check_state_fits(found: OptState, expected: ScaleByTekfacState) -> None:
    """Raises if an optimizer is given the state of another; `expected` may hold shapes only."""
    if broken := not_a_state(found):
        raise ValueError(f"state= must be what init or the previous update returned: {broken}")
    if sentence := difference(found, expected):
        raise ValueError(f"state= does not fit this optimizer: {sentence}")
    if not all(map(is_array, jax.tree.leaves(found))):
        raise ValueError("state= must hold arrays; a jax.ShapeDtypeStruct has no values")


def not_a_state(found: OptState) -> str:
    """Says what stands in the place of a state of ours, or of a part of it."""
    if not isinstance(found, ScaleByTekfacState):
        return f"a {type(found).__name__} is not a ScaleByTekfacState."
    # A checkpoint library may have put anything into the fields.
    _, _, layers, meaning = _fields(found)
    if not _is_mapping(layers):
        return f"its layers are a {type(layers).__name__} instead of a dict of LayerState."
    for path, layer in layers.items():
        if not isinstance(layer, LayerState):
            return f"its layer {path!r} is a {type(layer).__name__} instead of a LayerState."
        if broken := _not_a_layer(path, layer):
            return broken
    if not isinstance(meaning, StateKind | None):
        return f"its meaning is a {type(meaning).__name__} instead of a StateKind."
    for name, value in (meaning or _UNSAID)._asdict().items():
        if not is_integer(value) or 0 in np.shape(value):
            return f"{name!r} of its meaning is {value!r} instead of a number or a boolean."
    return ""


_UNSAID = StateKind(0, False, False, False, False)  # what a state of version 0 means

# Fields that may be None: for an embedding, without factors, or in a state of version 0.
_OPTIONAL = {"q_phi", "phi", "psi", "failed_in_a_row", "fallen_back"}


def _fields(state: tuple[object, ...]) -> tuple[object, ...]:
    """The fields of a NamedTuple, of which nothing is known yet."""
    return state


def _is_mapping(x: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(x, Mapping)


def is_missing(field: object) -> bool:
    """Whether a field is None, as in a state without factors or of an earlier version."""
    return field is None


def _not_a_layer(path: str, layer: LayerState) -> str:
    for name, value in layer._asdict().items():
        is_left_out = value is None and name in _OPTIONAL
        if not (is_left_out or _has_shape(value)):
            return f"{name!r} of layer {path!r} is a {type(value).__name__} instead of an array."
    are_folded = layer.q_psi.ndim == 1
    matrices = {"theta": layer.theta}
    if not are_folded:
        matrices["q_psi"] = layer.q_psi
    if not are_folded and layer.q_phi is not None:
        matrices["q_phi"] = layer.q_phi
    for name, matrix in matrices.items():
        if matrix.ndim < 2:
            return f"{name!r} of layer {path!r} has shape {matrix.shape} instead of a matrix's."
    return ""


def difference(found: ScaleByTekfacState, expected: ScaleByTekfacState) -> str:
    """The first difference between a given state and the one an optimizer expects.

    Shapes and dtypes are always compared, values where both states have them; `expected` may hold
    `jax.ShapeDtypeStruct`.
    """
    return (
        _of_scalars(found, expected)
        or of_version(found)
        or differing_paths(found.layers, expected.layers)
        or _of_meaning(found.meaning, expected.meaning)
        or first_of(_of_each_layer(found, expected))
    )


def differing_paths(found: Collection[str], expected: Collection[str]) -> str:
    """The same for the paths of layers only."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if not found:
        return "The state has no layers: does it belong to another optimizer?"
    if missing or extra:
        return f"The state lacks layers {missing} and has {extra}, which the network does not have."
    return ""


def differing_dimensions(path: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The same for the dimensions of a layer, (*lead, in[+1], out)."""
    if found == expected:
        return ""
    return (
        f"Layer {path!r} has dimensions (in, out) = {found} in the state and {expected} in the "
        "network."
    )


def dimensions(layer: LayerState) -> tuple[int, ...]:
    """The dimensions of a layer, (*lead, in[+1], out), from its state."""
    if is_folded(layer, "q_psi"):
        return tuple(layer.theta.shape)
    rows = layer.theta.shape[-2] if layer.q_phi is None else layer.q_phi.shape[-2]
    return (*layer.theta.shape[:-2], rows, layer.q_psi.shape[-2])


def too_new(version: int) -> str:
    """Says whether a later version of the library wrote a state."""
    if version <= STATE_VERSION:
        return ""
    return (
        f"The state has layout version {version}, but this tekfac_jax reads versions up to "
        f"{STATE_VERSION}: update tekfac_jax."
    )


def of_version(found: ScaleByTekfacState) -> str:
    """Says whether a state has another version of the layout."""
    without = any(is_missing(layer.failed_in_a_row) for layer in found.layers.values())
    if is_missing(found.meaning) or without:
        return (
            "The state has layout version 0, from an earlier tekfac_jax, but version "
            f"{STATE_VERSION} is expected: restore_state converts it."
        )
    return too_new(version_of(found.meaning)) if is_known(found.meaning.version) else ""


def _of_meaning(found: StateKind | None, expected: StateKind | None) -> str:
    if found is None or expected is None or not all(map(is_known, (*found, *expected))):
        return ""
    if describe(found) == describe(expected):
        return ""
    return (
        f"The state belongs to {describe(found)}, but the optimizer is {describe(expected)}: the "
        "shapes agree, the numbers mean something else."
    )


def describe(kind: StateKind) -> str:
    """The member of the family and the options that define what the averages mean."""
    plain, measured, location, running = (bool(largest(x)) for x in kind[1:])
    options = ['factors="location"'] * (location and not plain)
    options += ['rescaling="running"'] * (running and measured)
    name = member_of(plain, measured).name
    return f"{name} with {' and '.join(options)}" if options else name


def _of_scalars(found: ScaleByTekfacState, expected: ScaleByTekfacState) -> str:
    for name in ("count", "due"):
        x, y = (_type_and_shape(getattr(state, name)) for state in (found, expected))
        if x != y:
            return f"{name!r} is {x} in the state and {y} in the optimizer."
    return ""


def _type_and_shape(x: object) -> str:
    return f"{x.dtype}{list(x.shape)}" if _has_shape(x) else f"a {type(x).__name__}"


def _of_each_layer(found: ScaleByTekfacState, expected: ScaleByTekfacState) -> Iterator[str]:
    for path, layer in expected.layers.items():
        yield _of_layer(path, found.layers[path], layer)


def no_factors(path: str, found: LayerState) -> str:
    """Says whether Φ and Ψ are missing, dropped by `without_factors`."""
    if not is_missing(found.phi) and not is_missing(found.psi):
        return ""
    return (
        f"Layer {path!r} has no factors in the state: restore_state(..., factors=False) has them "
        "rebuilt."
    )


def _of_layer(path: str, found: LayerState, expected: LayerState) -> str:
    if missing := no_factors(path, found):
        return missing
    if is_folded(found, "psi") != is_folded(expected, "psi"):
        return (
            f"Layer {path!r} has shard_state={is_folded(found, 'psi')} in the state and "
            f"{is_folded(expected, 'psi')} in the optimizer."
        )
    if sizes := differing_dimensions(path, dimensions(found), dimensions(expected)):
        return sizes
    kept, wanted = tuple(found.theta.shape[-2:]), tuple(expected.theta.shape[-2:])
    if kept != wanted:
        return (
            f"Layer {path!r} keeps {kept} eigenvectors of its two sides in the state and {wanted} "
            "in the optimizer: use the same basis_rank and max_dim as before."
        )
    return _of_arrays(path, found, expected)


def _of_arrays(path: str, found: LayerState, expected: LayerState) -> str:
    for name in LayerState._fields:
        x: Shaped | None = getattr(found, name)
        y: Shaped | None = getattr(expected, name)
        if x is None and y is None:
            continue
        if x is None or y is None or tuple(x.shape) != tuple(y.shape):
            return f"{name!r} of layer {path!r} differs in shape between state and network."
        if x.dtype != y.dtype:
            return (
                f"{name!r} of layer {path!r} is {x.dtype} in the state and {y.dtype} in the "
                "optimizer: use the same factor_dtype as before."
            )
    return ""
