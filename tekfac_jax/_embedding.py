"""Contractions of an embedding, whose input is one row number at each position.

G_n = Σ_t e_{id_t} u_ntᵀ has a row for each row of the table and is zero in all that the example
does not name. Its input basis is the standard one, Q_Φ = I, in which Φ is diagonal: a vector.
Nothing here is as large as the square of the table's rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tekfac_jax._statistics import HIGHEST, Contraction, Factors


def contractions(rows: int) -> dict[str, Contraction]:
    """The contractions of `_statistics`, by name, for a table of so many rows.

    Each takes `a` [*lead, n, t, 1], row numbers, and `u` [*lead, n, t, o], and sums over n.
    """

    def exact(a: Array, u: Array) -> Factors:
        ids, g = _rows_of_gradient(a, u, rows)
        return Factors(_scatter(ids, jnp.sum(g**2, axis=-1), rows), _gram(g))

    def location(a: Array, u: Array) -> Factors:
        norms = jnp.sum(u**2, axis=-1)
        return Factors(_scatter(_row_numbers(a, rows), norms, rows), _gram(u))

    def plain(a: Array, u: Array) -> Factors:
        counts = _scatter(_row_numbers(a, rows), jnp.ones(a.shape[:-1], u.dtype), rows)
        return Factors(counts, _gram(u) / a.shape[-2])

    def gradient(a: Array, u: Array) -> Array:
        return _scatter(_row_numbers(a, rows), u, rows)

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


def _row_numbers(a: Float[Array, "*lead n t 1"], rows: int) -> Int[Array, "*lead n t"]:
    """As integers; negative ones count from the end, as in `jnp.take`."""
    ids = a[..., 0].astype(jnp.int32)
    return jnp.where(ids < 0, ids + rows, ids)


def _rows_of_gradient(
    a: Float[Array, "*lead n t 1"], u: Float[Array, "*lead n t o"], rows: int
) -> tuple[Int[Array, "*lead n t"], Float[Array, "*lead n t o"]]:
    """The rows of G_n that are not zero: where an example names a row first, all it has there."""
    ids = _row_numbers(a, rows)
    same = ids[..., :, None] == ids[..., None, :]
    g = jnp.einsum("...nts,...nso->...nto", same.astype(u.dtype), u, precision=HIGHEST)
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), k=-1)
    is_first = ~jnp.any(same & earlier, axis=-1)
    return ids, jnp.where(is_first[..., None], g, 0)


def _scatter(ids: Array, values: Array, rows: int) -> Array:
    """Adds values [*lead, n, t, ...] up by row number: [*lead, rows, ...]."""

    def one(ids: jax.Array, values: jax.Array) -> jax.Array:
        further = values.shape[ids.ndim :]
        return jnp.zeros((rows, *further), values.dtype).at[ids].add(values, mode="drop")

    for _ in range(ids.ndim - 2):
        one = jax.vmap(one)
    return one(ids, values)


def _gram(g: Float[Array, "*lead n t o"]) -> Float[Array, "*lead o o"]:
    g = g.reshape(*g.shape[:-3], -1, g.shape[-1])
    return jnp.matmul(g.mT, g, precision=HIGHEST)
