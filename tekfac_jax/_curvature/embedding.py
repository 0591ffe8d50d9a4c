"""Contractions of an embedding, whose input is one row number at each position.

G_n = Σ_t e_{id_t} u_ntᵀ has a row for each row of the table and is zero in all that the example
does not name. Its input basis is the standard one, Q_Φ = I, in which Φ is diagonal: a vector.
Nothing here is as large as the square of the table's rows.

A table that is attended too, as a tied output head, gets gradient in all its rows: G_n is formed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tekfac_jax._curvature import dense
from tekfac_jax._curvature.chunks import Contraction
from tekfac_jax._curvature.dense import Factors
from tekfac_jax._curvature.eigenbasis import HIGHEST
from tekfac_jax._curvature.normal_form import row_numbers


def contractions(rows: int) -> dict[str, Contraction]:
    """The contractions of `_statistics`, by name, for a table of so many rows.

    Each takes `a` [*lead, n, t, 1], row numbers, and `u` [*lead, n, t, o], and sums over n.
    """

    def exact(a: Array, u: Array) -> Factors:
        ids, g = _rows_of_gradient(a, u, rows)
        return Factors(_scatter(ids, jnp.sum(g**2, axis=-1), rows), dense.gram(g))

    def location(a: Array, u: Array) -> Factors:
        norms = jnp.sum(u**2, axis=-1)
        return Factors(_scatter(row_numbers(a[..., 0], rows), norms, rows), dense.gram(u))

    def plain(a: Array, u: Array) -> Factors:
        counts = _scatter(row_numbers(a[..., 0], rows), jnp.ones(a.shape[:-1], u.dtype), rows)
        return Factors(counts, dense.gram(u) / a.shape[-2])

    def gradient(a: Array, u: Array) -> Array:
        return _scatter(row_numbers(a[..., 0], rows), u, rows)

    return {"exact": exact, "location": location, "plain": plain, "gradient": gradient}


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
    """The rows of G_n that are not zero: where an example names a row first, all it has there."""
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


def attended_contractions() -> dict[str, Contraction]:
    """The same for a table that is attended: `a` [*lead, n, t, rows] is what meets each row."""

    def exact(a: Array, u: Array) -> Factors:
        g = dense.gradients(a, u)
        return Factors(jnp.sum(g**2, axis=(-3, -1)), dense.gram(g))

    def location(a: Array, u: Array) -> Factors:
        a_norms, u_norms = (jnp.sum(x**2, axis=-1, keepdims=True) for x in (a, u))
        return Factors(jnp.sum(a**2 * u_norms, axis=(-3, -2)), dense.gram(u * jnp.sqrt(a_norms)))

    def plain(a: Array, u: Array) -> Factors:
        return Factors(jnp.sum(a**2, axis=(-3, -2)), dense.gram(u) / a.shape[-2])

    return {"exact": exact, "location": location, "plain": plain, "gradient": dense.gradient}


def attended_rescaling(
    a: Float[Array, "*lead n t v"],
    u: Float[Array, "*lead n t o"],
    q_psi: Float[Array, "*lead o p"],
) -> Float[Array, "*lead v p"]:
    """Σ_n (G_n Q_Ψ)², the narrow side rotated before G_n is formed."""
    u = jnp.einsum("...nto,...op->...ntp", u, q_psi, precision=HIGHEST)
    return jnp.sum(dense.gradients(a, u) ** 2, axis=-3)


def _scatter(ids: Array, values: Array, rows: int) -> Array:
    """Adds values [*lead, n, t, ...] up by row number: [*lead, rows, ...]."""

    def one(ids: jax.Array, values: jax.Array) -> jax.Array:
        further = values.shape[ids.ndim :]
        return jnp.zeros((rows, *further), values.dtype).at[ids].add(values, mode="drop")

    for _ in range(ids.ndim - 2):
        one = jax.vmap(one)
    return one(ids, values)
