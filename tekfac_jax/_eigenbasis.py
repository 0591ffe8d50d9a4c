"""The Kronecker-factored eigenbasis: finding it, moving Θ into it, using it."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

HIGHEST = lax.Precision.HIGHEST


def eigenvectors(
    factor: Float[Array, "d d"],
) -> tuple[Float[Array, "d d"], Bool[Array, ""]]:
    """Eigenvectors of a symmetric factor (Eq. 3.1), and whether they can be used.

    The factor is divided by its trace first: eigenvectors do not care, and float32 neither
    over- nor underflows. `eigh` answers bad input with NaN instead of an error.
    """
    trace = jnp.trace(factor)
    # One unbatched eigh per factor: batched LAPACK calls can deadlock on CPU.
    _, q = jnp.linalg.eigh(factor / jnp.where(trace > 0, trace, 1), symmetrize_input=False)
    return q, jnp.all(jnp.isfinite(q))


def eigenvalues_in(factor: Float[Array, "d d"], q: Float[Array, "d d"]) -> Float[Array, " d"]:
    """diag(Qᵀ X Q), not below zero: the eigenvalues where Q is the factor's own eigenbasis."""
    rotated = jnp.matmul(factor, q, precision=HIGHEST)
    return jnp.maximum(jnp.sum(q * rotated, axis=0), 0)


def transport(
    theta: Float[Array, "i o"],
    old: tuple[Float[Array, "i i"], Float[Array, "o o"]],
    new: tuple[Float[Array, "i i"], Float[Array, "o o"]],
) -> Float[Array, "i o"]:
    """Θ of an old basis seen in a new one: (R_Φ∘R_Φ)ᵀ Θ (R_Ψ∘R_Ψ) with R = Q_oldᵀ Q_new.

    The diagonal of the old operator in the new basis. Keeps the trace and the sign, and undoes
    exactly what `eigh` may do to the order and the signs of its columns.
    """
    r_phi, r_psi = (
        jnp.matmul(q_old.T, q_new, precision=HIGHEST) ** 2
        for q_old, q_new in zip(old, new, strict=True)
    )
    return jnp.linalg.multi_dot([r_phi.T, theta, r_psi], precision=HIGHEST)


def rotate(
    g: Float[Array, "i o"], q_phi: Float[Array, "i j"], q_psi: Float[Array, "o p"]
) -> Float[Array, "j p"]:
    """Q_Φᵀ G Q_Ψ: (Q_Φ⊗Q_Ψ)ᵀ vec(G), row-major."""
    return jnp.matmul(jnp.matmul(q_phi.T, g, precision=HIGHEST), q_psi, precision=HIGHEST)


def precondition(
    g: Float[Array, "i o"],
    q_phi: Float[Array, "i i"],
    q_psi: Float[Array, "o o"],
    theta: Float[Array, "i o"],
    damping: jax.Array,
) -> Float[Array, "i o"]:
    """Q_Φ [(Q_Φᵀ G Q_Ψ) / (Θ + λ)] Q_Ψᵀ: Algorithm 1's three lines before the step (Eq. 3.9)."""
    scaled = rotate(g, q_phi, q_psi) / (theta + damping)
    return rotate(scaled, q_phi.T, q_psi.T)
