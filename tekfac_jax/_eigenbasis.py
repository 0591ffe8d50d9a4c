"""The Kronecker-factored eigenbasis: finding it, moving Θ into it, using it.

Q_Φ is None where it is the identity; Φ is then a vector, its diagonal.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from tekfac_jax._layers import zeros_like

HIGHEST = lax.Precision.HIGHEST


# A factor of so few rows is decomposed in closed form.
SMALL = 2


def eigenvectors(
    factor: Float[Array, "*lead d d"], mine: Bool[Array, "*lead"] | None = None
) -> Float[Array, "*lead d d"]:
    """Eigenvectors of symmetric factors (Eq. 3.1), not a number where they cannot be found.

    A factor is divided by its trace first: eigenvectors do not care, and float32 neither
    over- nor underflows. `eigh` answers bad input with NaN instead of an error. With `mine` only
    those for which it is true are computed, and zero stands for the others.
    """
    total = jnp.trace(factor, axis1=-2, axis2=-1)[..., None, None]
    return _eigh(factor / jnp.where(total > 0, total, 1), mine)


def _eigh(
    factor: Float[Array, "*lead d d"], mine: Bool[Array, "*lead"] | None
) -> Float[Array, "*lead d d"]:
    if factor.shape[-1] <= SMALL:
        q = _small_eigh(factor)
        return q if mine is None else jnp.where(mine[..., None, None], q, 0)

    def one(factor: jax.Array) -> jax.Array:
        return jnp.linalg.eigh(factor, symmetrize_input=False)[1]

    def one_if_mine(factor: jax.Array, mine: jax.Array) -> jax.Array:
        return lax.cond(mine, one, zeros_like, factor)

    if factor.ndim == 2:
        return one(factor) if mine is None else one_if_mine(factor, mine)
    flat = factor.reshape(-1, *factor.shape[-2:])
    if mine is not None:
        q = lax.map(lambda pair: one_if_mine(*pair), (flat, mine.ravel()))
        return q.reshape(factor.shape)
    # Batched LAPACK calls can deadlock on CPU; on GPU a batched call is what is fast.
    q = lax.platform_dependent(flat, cpu=lambda x: lax.map(one, x), default=jax.vmap(one))
    return q.reshape(factor.shape)


def _small_eigh(factor: Float[Array, "*lead d d"]) -> Float[Array, "*lead d d"]:
    """Of one or two dimensions: a rotation in closed form, for very many factors at once."""
    if factor.shape[-1] == 1:
        return factor * 0 + 1  # not a number where the factor is none
    a, b, c = factor[..., 0, 0], factor[..., 0, 1], factor[..., 1, 1]
    angle = jnp.atan2(2 * b, a - c) / 2  # of the larger eigenvalue's vector
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([-sin, cos], axis=-1), jnp.stack([cos, sin], axis=-1)], axis=-2)


def trace(
    factor: Float[Array, "..."], q: Float[Array, "*lead d r"] | None
) -> Float[Array, "*lead"]:
    """The trace of each factor; without a basis it is the vector of a diagonal."""
    return jnp.sum(factor, axis=-1) if q is None else jnp.trace(factor, axis1=-2, axis2=-1)


def eigenvalues_in(
    factor: Float[Array, "..."],
    q: Float[Array, "*lead d r"] | None,
) -> Float[Array, "*lead r"]:
    """diag(Qᵀ X Q), not below zero: the eigenvalues where Q is the factor's own eigenbasis."""
    if q is None:
        return jnp.maximum(factor, 0)
    rotated = jnp.matmul(factor, q, precision=HIGHEST)
    return jnp.maximum(jnp.sum(q * rotated, axis=-2), 0)


def transport(
    theta: Float[Array, "*lead r p"],
    rest: Float[Array, "*lead"],
    old: tuple[Float[Array, "*lead i r"] | None, Float[Array, "*lead o p"]],
    new: tuple[Float[Array, "*lead i r"] | None, Float[Array, "*lead o p"]],
) -> tuple[Float[Array, "*lead r p"], Float[Array, "*lead"]]:
    """Θ of an old basis seen in a new one: (R_Φ∘R_Φ)ᵀ Θ (R_Ψ∘R_Ψ) with R = Q_oldᵀ Q_new.

    The diagonal of the old operator in the new basis. Keeps the trace and the sign, and undoes
    exactly what `eigh` may do to the order and the signs of its columns. Outside of the columns
    that are kept the old operator is θ⊥, and `rest` is what of its trace lies there.
    """
    (old_phi, old_psi), (new_phi, new_psi) = old, new
    perp = outside(theta, rest, old)
    moved = theta - perp[..., None, None]
    if old_phi is not None and new_phi is not None:
        r_phi = jnp.matmul(old_phi.mT, new_phi, precision=HIGHEST) ** 2
        moved = jnp.matmul(r_phi.mT, moved, precision=HIGHEST)
    r_psi = jnp.matmul(old_psi.mT, new_psi, precision=HIGHEST) ** 2
    moved = jnp.matmul(moved, r_psi, precision=HIGHEST) + perp[..., None, None]
    if _number_outside(theta, old) == 0:
        return moved, rest
    total = jnp.sum(theta, axis=(-2, -1)) + rest
    return moved, jnp.maximum(total - jnp.sum(moved, axis=(-2, -1)), 0)


def outside(
    theta: Float[Array, "*lead r p"],
    rest: Float[Array, "*lead"],
    q: tuple[Float[Array, "*lead i r"] | None, Float[Array, "*lead o p"]],
) -> Float[Array, "*lead"]:
    """θ⊥: the mean eigenvalue outside of the columns that are kept; zero where all are."""
    return jnp.maximum(rest, 0) / max(1, _number_outside(theta, q))  # rounding may leave −0


def _number_outside(theta: Array, q: tuple[Array | None, Array]) -> int:
    q_phi, q_psi = q
    rows = theta.shape[-2] if q_phi is None else q_phi.shape[-2]
    return rows * q_psi.shape[-2] - theta.shape[-2] * theta.shape[-1]


def rotate(
    g: Float[Array, "*lead i o"],
    q_phi: Float[Array, "*lead i r"] | None,
    q_psi: Float[Array, "*lead o p"],
) -> Float[Array, "*lead r p"]:
    """Q_Φᵀ G Q_Ψ: (Q_Φ⊗Q_Ψ)ᵀ vec(G), row-major; the side first that leaves less to the other."""
    if q_phi is None:
        return jnp.matmul(g, q_psi, precision=HIGHEST)
    (i, r), (o, p) = q_phi.shape[-2:], q_psi.shape[-2:]
    if r * o * (i + p) <= p * i * (o + r):
        return jnp.matmul(jnp.matmul(q_phi.mT, g, precision=HIGHEST), q_psi, precision=HIGHEST)
    return jnp.matmul(q_phi.mT, jnp.matmul(g, q_psi, precision=HIGHEST), precision=HIGHEST)


def precondition(
    g: Float[Array, "*lead i o"],
    q_phi: Float[Array, "*lead i r"] | None,
    q_psi: Float[Array, "*lead o p"],
    theta: Float[Array, "*lead r p"],
    rest: Float[Array, "*lead"],
    damping: Float[Array, "*lead"],
) -> Float[Array, "*lead i o"]:
    """Q_Φ [(Q_Φᵀ G Q_Ψ) / (Θ + λ)] Q_Ψᵀ: Algorithm 1's three lines before the step (Eq. 3.9).

    Where not all columns are kept the operator is θ⊥ outside of them, and so the update there
    G / (θ⊥ + λ).
    """
    back = (None if q_phi is None else q_phi.mT), q_psi.mT
    damping = damping[..., None, None]
    rotated = rotate(g, q_phi, q_psi)
    if _number_outside(theta, (q_phi, q_psi)) == 0:
        return rotate(rotated / (theta + damping), *back)
    perp = outside(theta, rest, (q_phi, q_psi))[..., None, None] + damping
    return g / perp + rotate(rotated * (1 / (theta + damping) - 1 / perp), *back)
