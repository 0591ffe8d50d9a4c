"""The Kronecker-factored eigenbasis: finding it, moving Θ into it, using it."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

HIGHEST = lax.Precision.HIGHEST


def eigenvectors(
    factor: Float[Array, "*lead d d"],
) -> tuple[Float[Array, "*lead d d"], Bool[Array, "*lead"]]:
    """Eigenvectors of symmetric factors (Eq. 3.1), and whether they can be used.

    A factor is divided by its trace first: eigenvectors do not care, and float32 neither
    over- nor underflows. `eigh` answers bad input with NaN instead of an error.
    """
    total = trace(factor)[..., None, None]
    q = _eigh(factor / jnp.where(total > 0, total, 1))
    return q, jnp.all(jnp.isfinite(q), axis=(-2, -1))


def _eigh(factor: Float[Array, "*lead d d"]) -> Float[Array, "*lead d d"]:
    def one(factor: jax.Array) -> jax.Array:
        return jnp.linalg.eigh(factor, symmetrize_input=False)[1]

    if factor.ndim == 2:
        return one(factor)
    # Batched LAPACK calls can deadlock on CPU; on GPU a batched call is what is fast.
    flat = factor.reshape(-1, *factor.shape[-2:])
    q = lax.platform_dependent(flat, cpu=lambda x: lax.map(one, x), default=jax.vmap(one))
    return q.reshape(factor.shape)


def trace(factor: Float[Array, "*lead d d"]) -> Float[Array, "*lead"]:
    """The trace of each factor."""
    return jnp.trace(factor, axis1=-2, axis2=-1)


def eigenvalues_in(
    factor: Float[Array, "*lead d d"], q: Float[Array, "*lead d d"]
) -> Float[Array, "*lead d"]:
    """diag(Qᵀ X Q), not below zero: the eigenvalues where Q is the factor's own eigenbasis."""
    rotated = jnp.matmul(factor, q, precision=HIGHEST)
    return jnp.maximum(jnp.sum(q * rotated, axis=-2), 0)


def transport(
    theta: Float[Array, "*lead i o"],
    old: tuple[Float[Array, "*lead i i"], Float[Array, "*lead o o"]],
    new: tuple[Float[Array, "*lead i i"], Float[Array, "*lead o o"]],
) -> Float[Array, "*lead i o"]:
    """Θ of an old basis seen in a new one: (R_Φ∘R_Φ)ᵀ Θ (R_Ψ∘R_Ψ) with R = Q_oldᵀ Q_new.

    The diagonal of the old operator in the new basis. Keeps the trace and the sign, and undoes
    exactly what `eigh` may do to the order and the signs of its columns.
    """
    r_phi, r_psi = (
        jnp.matmul(q_old.mT, q_new, precision=HIGHEST) ** 2
        for q_old, q_new in zip(old, new, strict=True)
    )
    moved = jnp.matmul(r_phi.mT, theta, precision=HIGHEST)
    return jnp.matmul(moved, r_psi, precision=HIGHEST)


def rotate(
    g: Float[Array, "*lead i o"], q_phi: Float[Array, "*lead i j"], q_psi: Float[Array, "*lead o p"]
) -> Float[Array, "*lead j p"]:
    """Q_Φᵀ G Q_Ψ: (Q_Φ⊗Q_Ψ)ᵀ vec(G), row-major."""
    return jnp.matmul(jnp.matmul(q_phi.mT, g, precision=HIGHEST), q_psi, precision=HIGHEST)


def precondition(
    g: Float[Array, "*lead i o"],
    q_phi: Float[Array, "*lead i i"],
    q_psi: Float[Array, "*lead o o"],
    theta: Float[Array, "*lead i o"],
    damping: Float[Array, "*lead"],
) -> Float[Array, "*lead i o"]:
    """Q_Φ [(Q_Φᵀ G Q_Ψ) / (Θ + λ)] Q_Ψᵀ: Algorithm 1's three lines before the step (Eq. 3.9)."""
    scaled = rotate(g, q_phi, q_psi) / (theta + damping[..., None, None])
    return rotate(scaled, q_phi.mT, q_psi.mT)
