"""Contractions of an embedding, whose input is one row number at each position.

G_n = Σ_t e_{id_t} u_ntᵀ has one row per row of the table and is zero in the rows that example n
does not read. The input basis is the standard one, Q_Φ = I, in which Φ is diagonal: a vector.
No array here grows with the square of the number of rows.

A table that is also attended, as a tied output head, gets a gradient in every row. Its G_n is
formed.
"""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jnp.einsum`, `jnp.zeros` and others untyped.

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tekfac_jax._curvature import dense
from tekfac_jax._curvature.dense import Contractions, Factors
from tekfac_jax._curvature.eigenbasis import HIGHEST
from tekfac_jax._curvature.normal_form import row_numbers


def contractions(rows: int) -> Contractions:
    """The contractions of a table with that number of rows.

    Each takes `a` [*lead, n, t, 1], row numbers, and `u` [*lead, n, t, o].
    """

    def exact(a: Array, u: Array) -> Factors:
        ids, g = _rows_of_gradient(a, u, rows)
        return Factors(_scatter(ids, jnp.sum(g**2, axis=-1), rows), dense.gram(g))

    def location(a: Array, u: Array) -> Factors:
        u_norms = jnp.sum(u**2, axis=-1)
        return Factors(_scatter(row_numbers(a[..., 0], rows), u_norms, rows), dense.gram(u))

    def plain(a: Array, u: Array) -> Factors:
        counts = _scatter(row_numbers(a[..., 0], rows), jnp.ones(a.shape[:-1], u.dtype), rows)
        return Factors(counts, dense.gram(u) / a.shape[-2])

    def gradient(a: Array, u: Array) -> Array:
        return _scatter(row_numbers(a[..., 0], rows), u, rows)

    return Contractions(exact, location, plain, gradient)


def rescaling(
    a: Float[Array, "*lead n t 1"],
    u: Float[Array, "*lead n t o"],
    q_psi: Float[Array, "*lead o p"],
    rows: int,
) -> Float[Array, "*lead v p"]:
    """Σ_n (G_n Q_Ψ)²: Θ in the basis I ⊗ Q_Ψ."""
    ids, g = _rows_of_gradient(a, u, rows)
    rotated = jnp.einsum("...nto,...op->...ntp", g, q_psi, precision=HIGHEST)
    return _scatter(ids, rotated**2, rows)


def _rows_of_gradient(
    a: Float[Array, "*lead n t 1"], u: Float[Array, "*lead n t o"], rows: int
) -> tuple[Int[Array, "*lead n t"], Float[Array, "*lead n t o"]]:
    """The nonzero rows of G_n, each at the position where the example first reads that row."""
    ids = row_numbers(a[..., 0], rows)
    same = ids[..., :, None] == ids[..., None, :]
    g = jnp.einsum("...nts,...nso->...nto", same.astype(u.dtype), u, precision=HIGHEST)
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), k=-1)
    is_first = ~jnp.any(same & earlier, axis=-1)
    return ids, jnp.where(is_first[..., None], g, 0)


def squared_norms(
    a: Float[Array, "*lead n t 1"], u: Float[Array, "*lead n t o"], rows: int
) -> Float[Array, "*lead"]:
    """Σ_n ‖G_n‖²."""
    _, g = _rows_of_gradient(a, u, rows)
    return jnp.sum(g**2, axis=(-3, -2, -1))


def attended_contractions() -> Contractions:
    """The same for a table that is attended: `a` [*lead, n, t, rows] multiplies its rows."""

    def exact(a: Array, u: Array) -> Factors:
        g = dense.gradients(a, u)
        return Factors(jnp.sum(g**2, axis=(-3, -1)), dense.gram(g))

    def location(a: Array, u: Array) -> Factors:
        a_norms, u_norms = (jnp.sum(x**2, axis=-1, keepdims=True) for x in (a, u))
        return Factors(jnp.sum(a**2 * u_norms, axis=(-3, -2)), dense.gram(u * jnp.sqrt(a_norms)))

    def plain(a: Array, u: Array) -> Factors:
        return Factors(jnp.sum(a**2, axis=(-3, -2)), dense.gram(u) / a.shape[-2])

    return Contractions(exact, location, plain, dense.gradient)


def attended_rescaling(
    a: Float[Array, "*lead n t v"],
    u: Float[Array, "*lead n t o"],
    q_psi: Float[Array, "*lead o p"],
) -> Float[Array, "*lead v p"]:
    """Σ_n (G_n Q_Ψ)², with the narrow side rotated before G_n is formed."""
    u = jnp.einsum("...nto,...op->...ntp", u, q_psi, precision=HIGHEST)
    return jnp.sum(dense.gradients(a, u) ** 2, axis=-3)


def _scatter(ids: Array, values: Array, rows: int) -> Array:
    """Sums values [*lead, n, t, ...] by row number: [*lead, rows, ...]."""

    def one(ids: jax.Array, values: jax.Array) -> jax.Array:
        features = values.shape[ids.ndim :]
        return jnp.zeros((rows, *features), values.dtype).at[ids].add(values, mode="drop")

    for _ in range(ids.ndim - 2):
        one = jax.vmap(one)
    return one(ids, values)
