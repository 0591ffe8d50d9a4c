"""Contractions of a normalisation: the scale and bias of each feature form a layer of their own.

For one feature the gradient of example n is a pair, g_n = (Σ_t u_nt a_nt, Σ_t u_nt), where a is
the input of the scale. The Fisher block is 2×2 (1×1 without a bias). There is no output side, so
Φ is the whole block in every member of the family.
"""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jnp.einsum`, `jnp.zeros` and others untyped.

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tekfac_jax._curvature.dense import Contractions, Factors
from tekfac_jax._curvature.eigenbasis import HIGHEST


def contractions(use_bias: bool) -> Contractions:
    """The contractions of a normalisation; each takes `a` and `u` [*stack, n, t, features]."""

    def block(a: Array, u: Array) -> Array:
        g = _pairs(a, u, use_bias)
        return jnp.einsum("...nfi,...nfj->...fij", g, g, precision=HIGHEST)

    def exact(a: Array, u: Array) -> Factors:
        phi = block(a, u)
        return Factors(phi, jnp.trace(phi, axis1=-2, axis2=-1)[..., None, None])

    def plain(a: Array, u: Array) -> Factors:
        # A is the block, and U is 1 for each example.
        phi = block(a, u)
        return Factors(phi, lax.full_like(phi[..., :1, :1], a.shape[-3]))

    def gradient(a: Array, u: Array) -> Array:
        return jnp.sum(_pairs(a, u, use_bias), axis=-3)[..., None]

    return Contractions(exact, exact, plain, gradient)


def rescaling(
    a: Float[Array, "*stack n t f"],
    u: Float[Array, "*stack n t f"],
    q_phi: Float[Array, "*stack f i j"],
) -> Float[Array, "*stack f j 1"]:
    """Σ_n (Qᵀ g_n)²: the eigenvalues of each block, in its own eigenbasis."""
    g = _pairs(a, u, q_phi.shape[-1] == 2)
    rotated = jnp.einsum("...nfi,...fij->...nfj", g, q_phi, precision=HIGHEST)
    return jnp.sum(rotated**2, axis=-3)[..., None]


def _pairs(a: Array, u: Array, use_bias: bool) -> Array:
    """g_n for each feature, [*stack, n, features, 1 or 2]."""
    scale = jnp.sum(a * u, axis=-2)
    return jnp.stack([scale, jnp.sum(u, axis=-2)], axis=-1) if use_bias else scale[..., None]
