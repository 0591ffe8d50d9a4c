"""Sums over examples, one chunk at a time, so that memory stays bounded."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import math
import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._curvature.normal_form import normal_form
from tekfac_jax._layers.spec import LayerSpec, zeros_like
from tekfac_jax._layers.statistics import Capture
from tekfac_jax._layers.types import DType, PyTree

T = TypeVar("T")

# How many examples are handled at once if memory allows, and the most numbers they may take up.
_EXAMPLES_CPU = 8
_EXAMPLES = 32
_NUMBERS = 2**26

# Up to this size there is no loop: it would only add compile time.
_NO_LOOP = 2**21

# From `a` [*lead, n, t, in[+1]] and `u` [*lead, n, t, out] to sums over the n examples.
Contraction: TypeAlias = Callable[[jax.Array, jax.Array], T]


def sum_over_examples(
    contract: Contraction[T],
    spec: LayerSpec,
    captures: Sequence[Capture],
    scale: jax.Array,
    dtype: DType,
) -> T:
    """Applies a contraction to a layer's captures, a chunk of examples at a time.

    Args:
        contract: function of `a` [*lead, n, T, in[+1]] and `u` [*lead, n, T, out] that sums over n.
        spec: the layer.
        captures: one per call; the positions of all calls are concatenated.
        scale: what turns `u` into the gradient of the summed loss.
        dtype: of the arithmetic.

    Returns:
        What `contract` returns, summed over all examples.
    """
    return sum_in_chunks(
        _on_captures(contract, spec, scale, dtype),
        captures,
        len(spec.stack),
        chunk_size(spec, captures),
    )


def map_over_examples(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    spec: LayerSpec,
    captures: Sequence[Capture],
    scale: jax.Array,
    dtype: DType,
) -> jax.Array:
    """The same for a function that returns [*lead, n, ...]: concatenated over the chunks."""
    of_chunk = _on_captures(function, spec, scale, dtype)
    first, last = _split(captures, len(spec.stack), chunk_size(spec, captures))
    axis = len(spec.lead)
    if first is None:
        return of_chunk(last)

    def next_chunk(carry: None, chunk: Sequence[Capture]) -> tuple[None, jax.Array]:
        return None, of_chunk(chunk)

    _, parts = lax.scan(next_chunk, None, first)
    parts = jnp.moveaxis(parts, 0, axis)
    whole = parts.reshape(*parts.shape[:axis], -1, *parts.shape[axis + 2 :])
    return whole if last is None else jnp.concatenate([whole, of_chunk(last)], axis=axis)


def sum_in_chunks(function: Callable[[PyTree], T], arrays: PyTree, axis: int, size: int) -> T:
    """Σ function(chunk) over chunks of at most `size` along an axis of all arrays."""
    first, last = _split(arrays, axis, size)
    if first is None:
        return function(last)
    if last is None:
        one = jax.tree.map(operator.itemgetter(0), first)
        start = jax.tree.map(zeros_like, jax.eval_shape(function, one))
    else:
        start = function(last)

    def add(total: T, chunk: PyTree) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, function(chunk)), None

    return lax.scan(add, start, first)[0]


def _on_captures(
    contract: Contraction[T], spec: LayerSpec, scale: jax.Array, dtype: DType
) -> Callable[[Sequence[Capture]], T]:
    """A contraction as a function of captures instead of `a` and `u`."""

    def on_captures(chunk: Sequence[Capture]) -> T:
        scaled = [Capture(c.a, c.u.astype(dtype) * scale.astype(dtype)) for c in chunk]
        forms = [normal_form(spec, capture, dtype) for capture in scaled]
        a = jnp.concatenate([a for a, _ in forms], axis=-2)
        u = jnp.concatenate([u for _, u in forms], axis=-2)
        return contract(a, u)

    return on_captures


def _split(arrays: PyTree, axis: int, size: int) -> tuple[PyTree, PyTree]:
    """Equal chunks with a new leading axis, and the remainder; None for either if it is empty."""
    n = jax.tree.leaves(arrays)[0].shape[axis]
    size = -(-n // -(-n // size))  # as even as possible
    if size == n:
        return None, arrays
    chunks, remainder = divmod(n, size)

    def equal_chunks(x: jax.Array) -> jax.Array:
        x = lax.slice_in_dim(x, 0, n - remainder, axis=axis)
        x = x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def last_chunk(x: jax.Array) -> jax.Array:
        return lax.slice_in_dim(x, n - remainder, n, axis=axis)

    last = jax.tree.map(last_chunk, arrays)
    return jax.tree.map(equal_chunks, arrays), last if remainder else None


def chunk_size(spec: LayerSpec, captures: Sequence[Capture]) -> int:
    """How many examples are handled at once."""
    t, i, o = positions_of(spec, captures), spec.in_dim, spec.out_dim
    n, layers = captures[0].u.shape[len(spec.stack)], math.prod(spec.lead)
    if t == 1:
        return n
    if spec.kind == "embed" and not spec.attended:  # G_n only in the rows that an example reads
        numbers, factors = t * (t + o), o * o
    else:
        numbers, factors = t * (i + o) + i * o, i * i + o * o
    if layers * n * numbers <= _NO_LOOP:
        return n
    # Adding a chunk's factors to the sum should not cost more than reading the chunk.
    preferred = max(usual_size(), 2 * factors // (t * (i + o)))
    return max(1, min(n, preferred, _NUMBERS // (layers * numbers)))


def chunk_size_of(array: jax.Array, axis: int) -> int:
    """The same for an array with the examples along an axis."""
    return array.shape[axis] if array.size <= _NO_LOOP else usual_size()


def usual_size() -> int:
    """How many examples are handled at once by default."""
    return _EXAMPLES_CPU if on_cpu() else _EXAMPLES


def positions_of(spec: LayerSpec, captures: Sequence[Capture]) -> int:
    """T of all calls together."""
    n = captures[0].u.shape[len(spec.stack)]
    return sum(c.u.size for c in captures) // (math.prod(spec.lead) * n * spec.out_dim)


def on_cpu() -> bool:
    """Whether JAX runs on CPU, where many small products are faster than one large batched one."""
    return jax.default_backend() == "cpu"
