"""Pure contractions: from captures to factors and to the re-scaling Θ.

Every function returns a **sum over examples**. The caller divides by their number, after summing
over devices if there are several. Everything is a function of

    G_n = Σ_t a_nt u_ntᵀ    (*lead, in[+1], out), the gradient of example n,

where positions are summed before anything is squared.
"""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jnp.einsum`, `jnp.zeros` and others untyped.

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tekfac_jax._curvature.chunks import Contraction, on_cpu
from tekfac_jax._curvature.cost import factor_order, rescaling_order
from tekfac_jax._curvature.eigenbasis import HIGHEST
from tekfac_jax._layers.spec import LayerSpec, keeps_all, zeros_like

# Up to so many positions, Σ (Σ_t a_t u_tᵀ)² is one matrix product over pairs of positions.
_FEW = 4
_BLOCK = 256  # rows of the smallest matrix product that still runs near peak speed


class Factors(NamedTuple):
    """The two factors of one layer, summed over examples or averaged.

    Attributes:
        phi: input side, (in[+1], in[+1]): δΦ (trace-restricted) or A (plain).
        psi: output side, (out, out): δΨ or U.
    """

    phi: jax.Array
    psi: jax.Array


class Contractions(NamedTuple):
    """The contractions of one kind of layer: functions of `a` and `u` that sum over examples.

    Attributes:
        exact: Φ and Ψ as the partial traces of the Fisher block.
        location: Φ and Ψ with positions taken as uncorrelated.
        plain: KFAC's A and U.
        gradient: Σ_n G_n itself, (*lead, in[+1], out).
    """

    exact: Contraction[Factors]
    location: Contraction[Factors]
    plain: Contraction[Factors]
    gradient: Contraction[jax.Array]


def exact_factors(a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]) -> Factors:
    """Σ_n G_n G_nᵀ and Σ_n G_nᵀ G_n: the partial traces of the Fisher block.

    Generalises Eq. 2.10 of the paper to several positions; both traces are Σ_n ‖G_n‖² = δN. Each
    factor comes from G_n or from products of positions, whichever is cheaper (`cost`).
    """
    t, i, o = *a.shape[-2:], u.shape[-1]
    if t == 1:
        return location_factors(a, u)
    order = factor_order(t, i, o)
    if not any(order):
        return Factors(_through_positions(a, u), _through_positions(u, a))
    found = factors_of_gradients(gradients(a, u))  # XLA drops an unused one
    return Factors(
        found.phi if order.phi_from_gradient else _through_positions(a, u),
        found.psi if order.psi_from_gradient else _through_positions(u, a),
    )


def gradients(
    a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]
) -> Float[Array, "*lead n i o"]:
    """G_n."""
    return jnp.einsum("...nti,...nto->...nio", a, u, precision=HIGHEST)


def factors_of_gradients(g: Float[Array, "*lead n i o"]) -> Factors:
    """Σ_n G_n G_nᵀ and Σ_n G_nᵀ G_n."""

    def rows(x: Array, y: Array) -> Array:
        return jnp.einsum("...nio,...njo->...ij", x, y, precision=HIGHEST)

    psi = jnp.einsum("...nio,...nip->...op", g, g, precision=HIGHEST)
    return Factors(_symmetric(rows, g, g, axis=-2), psi)


def _through_positions(
    x: Float[Array, "*lead n t d"], y: Float[Array, "*lead n t e"]
) -> Float[Array, "*lead d d"]:
    """Σ_n x_nᵀ (y_n y_nᵀ) x_n."""

    def columns(x: Array, z: Array) -> Array:
        return jnp.matmul(x.mT, z, precision=HIGHEST)

    products = jnp.matmul(y, y.mT, precision=HIGHEST)
    z = jnp.matmul(products, x, precision=HIGHEST)
    found = _symmetric(columns, *map(_positions_as_examples, (x, z)), axis=-1)
    return (found + found.mT) / 2  # symmetric but for rounding


def _symmetric(
    product: Callable[[Array, Array], Array], x: Array, y: Array, axis: int
) -> Float[Array, "*lead d d"]:
    """A symmetric product; a large one is built from blocks: three products instead of four."""
    half = x.shape[axis] // 2
    if half < _BLOCK:
        return product(x, y)
    (x_upper, x_lower), (y_upper, y_lower) = (jnp.split(z, [half], axis) for z in (x, y))
    corner = product(x_upper, y_lower)
    upper = jnp.concatenate([product(x_upper, y_upper), corner], axis=-1)
    lower = jnp.concatenate([corner.mT, product(x_lower, y_lower)], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def location_factors(a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]) -> Factors:
    """Σ_nt ‖u‖² aaᵀ and Σ_nt ‖a‖² uuᵀ: Eq. 2.10, with positions taken as uncorrelated."""
    a, u = _positions_as_examples(a), _positions_as_examples(u)
    a_norms = jnp.sum(a**2, axis=-1, keepdims=True)
    u_norms = jnp.sum(u**2, axis=-1, keepdims=True)
    phi = jnp.matmul((a * u_norms).mT, a, precision=HIGHEST)
    psi = jnp.matmul((u * a_norms).mT, u, precision=HIGHEST)
    return Factors(phi, psi)


def plain_factors(a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]) -> Factors:
    """Σ_n Σ_t aaᵀ and Σ_n mean_t uuᵀ: KFAC's A and U (Eq. 2.4; conv: Grosse and Martens 2016)."""
    return Factors(gram(a), gram(u) / a.shape[-2])


def gram(x: Float[Array, "*lead n t d"]) -> Float[Array, "*lead d d"]:
    """Σ_nt xxᵀ."""
    x = _positions_as_examples(x)
    return jnp.matmul(x.mT, x, precision=HIGHEST)


def rescaling(
    a: Float[Array, "*lead n t i"],
    u: Float[Array, "*lead n t o"],
    q_phi: Float[Array, "*lead i r"],
    q_psi: Float[Array, "*lead o p"],
) -> Float[Array, "*lead r p"]:
    """Σ_n (Q_Φᵀ G_n Q_Ψ)²: the re-scaling Θ of Eq. 3.2, the square inside the mean.

    Each side is rotated either at every position, before G_n is formed, or in G_n: whichever is
    cheaper (`cost`).
    """
    (t, i), o, r, p = a.shape[-2:], u.shape[-1], q_phi.shape[-1], q_psi.shape[-1]
    order = rescaling_order(t, i, o, r, p)
    if order.a_early:
        a = jnp.einsum("...nti,...ir->...ntr", a, q_phi, precision=HIGHEST)
    if order.u_early:
        u = jnp.einsum("...nto,...op->...ntp", u, q_psi, precision=HIGHEST)
    if all(order):
        return _squared_gradients(a, u)
    late = (None if order.a_early else q_phi), (None if order.u_early else q_psi)
    return rescaling_of_gradients(gradients(a, u), *late)


def rescaling_of_gradients(
    g: Float[Array, "*lead n i o"],
    q_phi: Float[Array, "*lead i r"] | None,
    q_psi: Float[Array, "*lead o p"] | None,
) -> Float[Array, "*lead r p"]:
    """Σ_n (Q_Φᵀ G_n Q_Ψ)²; a side whose basis is None is rotated already."""
    if q_psi is not None:
        g = jnp.einsum("...nio,...op->...nip", g, q_psi, precision=HIGHEST)
    if q_phi is None:
        return jnp.sum(g**2, axis=-3)
    # With examples in the middle the rotation is one matrix product.
    g = jnp.einsum("...ir,...nip->...rnp", q_phi, g, precision=HIGHEST)
    return jnp.sum(g**2, axis=-2)


def _squared_gradients(
    a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]
) -> Float[Array, "*lead i o"]:
    """Σ_n (Σ_t a_nt u_ntᵀ)², without forming all G_n at once where that would dominate the time."""
    t, i, o = *a.shape[-2:], u.shape[-1]
    if t <= _FEW:
        # (Σ_t x_t)² = Σ_t x_t² + 2 Σ_k Σ_t x_t x_(t+k): over pairs of positions, k apart.
        pairs = [(x[..., k:, :], x[..., : t - k, :]) for x in (a, u) for k in range(t)]
        a, u = (jnp.concatenate([x * y for x, y in own], axis=-2) for own in (pairs[:t], pairs[t:]))
        counted = jnp.where(jnp.arange(a.shape[-2]) < t, 1, 2).astype(u.dtype)[:, None]
        a, u = _positions_as_examples(a), _positions_as_examples(u * counted)
        return jnp.maximum(jnp.matmul(a.mT, u, precision=HIGHEST), 0)  # rounding may leave −0
    if on_cpu() and a.ndim == 3 and 2 * i * o >= t * (i + o):
        # One G_n at a time stays in the cache.
        def one(a: Array, u: Array) -> Array:
            return jnp.matmul(a.mT, u, precision=HIGHEST) ** 2

        def add(total: Array, example: tuple[Array, Array]) -> tuple[Array, None]:
            return total + one(*example), None

        return lax.scan(add, zeros_like(jax.eval_shape(one, a[0], u[0])), (a, u))[0]
    return jnp.sum(gradients(a, u) ** 2, axis=-3)


class Rescaling(NamedTuple):
    """Θ in the columns of a basis, and the trace outside of them, summed over examples.

    Attributes:
        theta: Σ_n (Q_Φᵀ G_n Q_Ψ)², (kept columns of Q_Φ, of Q_Ψ).
        rest: Σ_n ‖G_n‖² − Σ Θ, over the same examples; zero if every column is kept.
    """

    theta: jax.Array
    rest: jax.Array


def with_rest(
    spec: LayerSpec, theta: Float[Array, "*lead r p"], trace: Callable[[], Float[Array, "*lead"]]
) -> Rescaling:
    """Θ and the trace outside of its columns; calls `trace` only if some columns are left out."""
    kept = jnp.sum(theta, axis=(-2, -1))
    if keeps_all(spec, theta.shape):
        return Rescaling(theta, jnp.zeros_like(kept))
    return Rescaling(theta, trace() - kept)


def squared_norms(
    a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]
) -> Float[Array, "*lead"]:
    """Σ_n ‖G_n‖², from G_n or from products of positions, whichever is cheaper."""
    t, i, o = *a.shape[-2:], u.shape[-1]
    if t * (i + o) > i * o:
        return jnp.sum(gradients(a, u) ** 2, axis=(-3, -2, -1))
    a, u = (jnp.matmul(x, x.mT, precision=HIGHEST) for x in (a, u))
    return jnp.sum(a * u, axis=(-3, -2, -1))


def gradient(
    a: Float[Array, "*lead n t i"], u: Float[Array, "*lead n t o"]
) -> Float[Array, "*lead i o"]:
    """Σ_n G_n itself."""
    return jnp.einsum("...nti,...nto->...io", a, u, precision=HIGHEST)


def contractions() -> Contractions:
    """The contractions of a dense layer or a convolution."""
    return Contractions(exact_factors, location_factors, plain_factors, gradient)


def _positions_as_examples(x: Float[Array, "*lead n t d"]) -> Float[Array, "*lead m d"]:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])
