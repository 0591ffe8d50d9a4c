"""Pure contractions: from captures to factors and to the re-scaling Θ.

Every function returns a **sum over examples**; the caller divides by their number, after adding
up over devices where there are several. Within a layer everything is a function of

    G_n = Σ_t a_nt u_ntᵀ    (*lead, in[+1], out), the gradient of example n,

and positions are summed before anything is squared.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tekfac_jax._layers import Capture, LayerSpec, normal_form, zeros_like

HIGHEST = lax.Precision.HIGHEST

# Examples handled at once where G_n is formed, and the numbers that they may take up. On CPU
# small matrix products are fast and large batched ones are not; elsewhere it is the reverse.
_CHUNK_CPU = 16
_CHUNK = 32
_CHUNK_NUMBERS = 2**26

_BLOCK = 256  # rows of a matrix product that still runs near the peak


class Factors(NamedTuple):
    """The two factors of one layer, summed over examples or averaged.

    Attributes:
        phi: input side, (in[+1], in[+1]): δΦ (trace-restricted) or A (plain).
        psi: output side, (out, out): δΨ or U.
    """

    phi: jax.Array
    psi: jax.Array


Contraction = Callable[[Array, Array], Any]


def exact_factors(a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]) -> Factors:
    """Σ_n G_n G_nᵀ and Σ_n G_nᵀ G_n: the partial traces of the Fisher block.

    Generalises Eq. 2.10 of the paper to several positions; the traces are Σ_n ‖G_n‖² = δN.
    """
    if a.shape[-2] == 1:
        return location_factors(a, u)
    g = jnp.einsum("...nti,...nto->...nio", a, u, precision=HIGHEST)
    psi = jnp.einsum("...nio,...nip->...op", g, g, precision=HIGHEST)
    return Factors(_row_products(g), psi)


def _row_products(g: Float[Array, "*lead n i o"]) -> Float[Array, "*lead i i"]:
    """Σ_n G_n G_nᵀ. A large one is built from blocks, three products of four: it is symmetric."""

    def block(x: Array, y: Array) -> Array:
        return jnp.einsum("...nio,...njo->...ij", x, y, precision=HIGHEST)

    half = g.shape[-2] // 2
    if half < _BLOCK:
        return block(g, g)
    upper, lower = g[..., :half, :], g[..., half:, :]
    corner = block(upper, lower)
    return jnp.block([[block(upper, upper), corner], [corner.mT, block(lower, lower)]])


def location_factors(a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]) -> Factors:
    """Σ_nt ‖u‖² aaᵀ and Σ_nt ‖a‖² uuᵀ: Eq. 2.10 with positions taken as uncorrelated."""
    a, u = _positions_as_examples(a), _positions_as_examples(u)
    a_norms = jnp.sum(a**2, axis=-1, keepdims=True)
    u_norms = jnp.sum(u**2, axis=-1, keepdims=True)
    phi = jnp.matmul((a * u_norms).mT, a, precision=HIGHEST)
    psi = jnp.matmul((u * a_norms).mT, u, precision=HIGHEST)
    return Factors(phi, psi)


def plain_factors(a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]) -> Factors:
    """Σ_n Σ_t aaᵀ and Σ_n mean_t uuᵀ: KFAC's A and U (Eq. 2.4; conv: Grosse and Martens 2016)."""
    positions = a.shape[-2]
    a, u = _positions_as_examples(a), _positions_as_examples(u)
    phi = jnp.matmul(a.mT, a, precision=HIGHEST)
    psi = jnp.matmul(u.mT, u, precision=HIGHEST) / positions
    return Factors(phi, psi)


def rescaling(
    a: Float[Array, "*lead n t i"],
    u: Float[Array, "*lead n t o"],
    q_phi: Float[Array, "*lead i j"],
    q_psi: Float[Array, "*lead o p"],
) -> Float[Array, "*lead j p"]:
    """Σ_n (Q_Φᵀ G_n Q_Ψ)²: the re-scaling Θ of Eq. 3.2, the square inside the mean.

    Each side is rotated where it is smaller: before G_n is formed (T rows) or after (the other
    side's width).
    """
    positions, i, o = *a.shape[-2:], u.shape[-1]
    rotate_a, rotate_u = positions < o, positions < i
    if rotate_a:
        a = jnp.einsum("...nti,...ij->...ntj", a, q_phi, precision=HIGHEST)
    if rotate_u:
        u = jnp.einsum("...nto,...op->...ntp", u, q_psi, precision=HIGHEST)
    if positions == 1:
        return jnp.matmul(a[..., 0, :].mT ** 2, u[..., 0, :] ** 2, precision=HIGHEST)
    # Examples stand in the middle: then rotating either side is one matrix product.
    g = jnp.einsum("...nti,...nto->...ino", a, u, precision=HIGHEST)
    if not rotate_a:
        g = jnp.einsum("...ij,...ino->...jno", q_phi, g, precision=HIGHEST)
    if not rotate_u:
        g = jnp.einsum("...jno,...op->...jnp", g, q_psi, precision=HIGHEST)
    return jnp.sum(g**2, axis=-2)


class Rescaling(NamedTuple):
    """Θ in the columns of a basis, and the trace that lies outside of them, summed over examples.

    Attributes:
        theta: Σ_n (Q_Φᵀ G_n Q_Ψ)², (kept columns of Q_Φ, of Q_Ψ).
        rest: Σ_n ‖G_n‖² − Σ Θ, of the same examples; zero where every column is kept.
    """

    theta: jax.Array
    rest: jax.Array


def squared_norms(
    a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]
) -> Float[Array, "*lead"]:
    """Σ_n ‖G_n‖², through G_n or through the positions' products, whichever is cheaper."""
    positions, i, o = *a.shape[-2:], u.shape[-1]
    if positions * (i + o) > i * o:
        g = jnp.einsum("...nti,...nto->...nio", a, u, precision=HIGHEST)
        return jnp.sum(g**2, axis=(-3, -2, -1))
    a, u = (jnp.matmul(x, x.mT, precision=HIGHEST) for x in (a, u))
    return jnp.sum(a * u, axis=(-3, -2, -1))


def gradient(
    a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]
) -> Float[Array, "*lead i o"]:
    """Σ_n G_n itself."""
    return jnp.einsum("...nti,...nto->...io", a, u, precision=HIGHEST)


def sum_over_examples(
    contract: Contraction,
    spec: LayerSpec,
    captures: Sequence[Capture],
    scale: jax.Array,
    dtype: Any,
) -> Any:
    """Applies a contraction to a layer's captures, a chunk of examples at a time.

    Args:
        contract: function of `a` [*lead, n, T, in[+1]] and `u` [*lead, n, T, out], sums over n.
        spec: the layer.
        captures: one per call; further calls count as further positions.
        scale: what turns `u` into the gradient of the summed loss.
        dtype: of the arithmetic.

    Returns:
        What `contract` returns, summed over all examples.
    """
    batch = len(spec.stack)  # the axis of the examples

    def scaled(capture: Capture) -> Capture:
        return Capture(capture.a, capture.u.astype(dtype) * scale.astype(dtype))

    def partial_sum(chunk: Sequence[Capture]) -> Any:
        forms = [normal_form(spec, scaled(capture), dtype) for capture in chunk]
        a = jnp.concatenate([a for a, _ in forms], axis=-2)
        u = jnp.concatenate([u for _, u in forms], axis=-2)
        return contract(a, u)

    n = captures[0].u.shape[batch]
    size = min(n, _chunk_size(spec, captures))
    if size == n:
        return partial_sum(captures)
    chunks, rest = divmod(n, size)

    def split(x: jax.Array) -> jax.Array:
        x = lax.slice_in_dim(x, 0, n - rest, axis=batch)
        x = x.reshape(*x.shape[:batch], chunks, size, *x.shape[batch + 1 :])
        return jnp.moveaxis(x, batch, 0)

    xs = jax.tree.map(split, captures)
    if rest:
        last = jax.tree.map(lambda x: lax.slice_in_dim(x, n - rest, n, axis=batch), captures)
        start = partial_sum(last)
    else:
        first = jax.tree.map(lambda x: x[0], xs)
        start = jax.tree.map(zeros_like, jax.eval_shape(partial_sum, first))

    def add(total: Any, chunk: Sequence[Capture]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, partial_sum(chunk)), None

    return lax.scan(add, start, xs)[0]


def _chunk_size(spec: LayerSpec, captures: Sequence[Capture]) -> int:
    """How many examples are handled at once."""
    layers = math.prod(spec.lead)
    n = captures[0].u.shape[len(spec.stack)]
    positions = sum(c.u.size for c in captures) // (layers * n * spec.out_dim)
    if positions == 1:
        return n
    if spec.kind == "embed" and not spec.attended:  # G_n only in the rows that an example names
        numbers = positions * (positions + spec.out_dim)
    else:
        numbers = positions * (spec.in_dim + spec.out_dim) + spec.in_dim * spec.out_dim
    most = _CHUNK_CPU if jax.default_backend() == "cpu" else _CHUNK
    return max(1, min(n, most, _CHUNK_NUMBERS // (layers * numbers)))


def _positions_as_examples(x: Float[Array, "*lead n t d"]) -> Float[Array, "*lead m d"]:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])
