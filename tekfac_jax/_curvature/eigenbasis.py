"""The Kronecker-factored eigenbasis: transporting Θ into it, preconditioning in it.

Where Q_Φ is the identity it is None, and Φ is a vector, its diagonal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

HIGHEST = lax.Precision.HIGHEST


def trace(
    factor: Float[Array, "..."], q: Float[Array, "*lead d r"] | None
) -> Float[Array, "*lead"]:
    """The trace of each factor; without a basis the factor is a diagonal, kept as a vector."""
    return jnp.sum(factor, axis=-1) if q is None else matrix_trace(factor)


def matrix_trace(x: Float[Array, "*lead d d"]) -> Float[Array, "*lead"]:
    """Σ_k x_kk, from the diagonal alone: `jnp.trace` masks the whole matrix."""
    dim = x.shape[-1]
    flat = x.reshape(*x.shape[:-2], dim * dim)
    return jnp.sum(lax.slice_in_dim(flat, 0, None, dim + 1, axis=-1), axis=-1)


def eigenvalues_in(
    factor: Float[Array, "..."],
    q: Float[Array, "*lead d r"] | None,
) -> Float[Array, "*lead r"]:
    """diag(Qᵀ X Q), clipped at zero: the eigenvalues if Q is the factor's own eigenbasis."""
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

    This is the diagonal of the old operator in the new basis. It keeps the trace and the sign, and
    it is exact if the new basis only reorders columns or flips their signs. Outside of the kept
    columns the old operator is θ⊥, and `rest` is the trace there.
    """
    if _number_outside(theta, old) == 0:
        return _seen_in(theta, old, new), rest
    perp = outside(theta, rest, old)
    moved = _seen_in(theta - perp[..., None, None], old, new) + perp[..., None, None]
    total = jnp.sum(theta, axis=(-2, -1)) + rest
    return moved, jnp.maximum(total - jnp.sum(moved, axis=(-2, -1)), 0)


def _seen_in(
    theta: Float[Array, "*lead r p"],
    old: tuple[Float[Array, "*lead i r"] | None, Float[Array, "*lead o p"]],
    new: tuple[Float[Array, "*lead i r"] | None, Float[Array, "*lead o p"]],
) -> Float[Array, "*lead r p"]:
    """(R_Φ∘R_Φ)ᵀ Θ (R_Ψ∘R_Ψ)."""
    (old_phi, old_psi), (new_phi, new_psi) = old, new
    if old_phi is not None and new_phi is not None:
        r_phi = jnp.matmul(old_phi.mT, new_phi, precision=HIGHEST) ** 2
        theta = jnp.matmul(r_phi.mT, theta, precision=HIGHEST)
    r_psi = jnp.matmul(old_psi.mT, new_psi, precision=HIGHEST) ** 2
    return jnp.matmul(theta, r_psi, precision=HIGHEST)


def outside(
    theta: Float[Array, "*lead r p"],
    rest: Float[Array, "*lead"],
    q: tuple[Float[Array, "*lead i r"] | None, Float[Array, "*lead o p"]],
) -> Float[Array, "*lead"]:
    """θ⊥: the mean eigenvalue outside of the kept columns; zero if all are kept."""
    return jnp.maximum(rest, 0) / max(1, _number_outside(theta, q))  # rounding may leave −0


def _number_outside(theta: Array, q: tuple[Array | None, Array]) -> int:
    """How many eigenvalues lie outside of the kept columns."""
    q_phi, q_psi = q
    rows = theta.shape[-2] if q_phi is None else q_phi.shape[-2]
    return rows * q_psi.shape[-2] - theta.shape[-2] * theta.shape[-1]


def rotate(
    g: Float[Array, "*lead i o"],
    q_phi: Float[Array, "*lead i r"] | None,
    q_psi: Float[Array, "*lead o p"],
) -> Float[Array, "*lead r p"]:
    """Q_Φᵀ G Q_Ψ = (Q_Φ⊗Q_Ψ)ᵀ vec(G), row-major, multiplied in the cheaper order."""
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
    """Q_Φ [(Q_Φᵀ G Q_Ψ) / (Θ + λ)] Q_Ψᵀ: the three lines of Algorithm 1 before the step (Eq. 3.9).

    If some columns are left out, the operator outside of the kept ones is θ⊥, so the update there
    is G / (θ⊥ + λ).
    """
    back = (None if q_phi is None else q_phi.mT), q_psi.mT
    damping = damping[..., None, None]
    rotated = rotate(g, q_phi, q_psi)
    if _number_outside(theta, (q_phi, q_psi)) == 0:
        return rotate(rotated / (theta + damping), *back)
    perp = outside(theta, rest, (q_phi, q_psi))[..., None, None] + damping
    return g / perp + rotate(rotated * (1 / (theta + damping) - 1 / perp), *back)


class Basis(NamedTuple):
    """The eigenbasis in which Θ is measured; Q_Φ is None where it is the identity."""

    q_phi: jax.Array | None
    q_psi: jax.Array
