"""Which contraction serves which kind of layer."""

from typing import Literal

import jax
import jax.numpy as jnp

from tekfac_jax import _embedding, _statistics
from tekfac_jax._layers import LayerSpec
from tekfac_jax._statistics import HIGHEST, Contraction

Factors = Literal["exact", "location", "plain"]


def factors_of(spec: LayerSpec, kind: Factors) -> Contraction:
    """The two factors of a layer: exact or location (Φ and Ψ), or plain (A and U)."""
    if spec.kind == "embed":
        return _embedding.contractions(spec.in_dim)[kind]
    return {
        "exact": _statistics.exact_factors,
        "location": _statistics.location_factors,
        "plain": _statistics.plain_factors,
    }[kind]


def rescaling_of(spec: LayerSpec, q_phi: jax.Array | None, q_psi: jax.Array) -> Contraction:
    """Θ in a basis; `q_phi` is None for an embedding."""

    def contract(a: jax.Array, u: jax.Array) -> jax.Array:
        if q_phi is None:
            return _embedding.rescaling(a, u, q_psi, spec.in_dim)
        return _statistics.rescaling(a, u, q_phi, q_psi)

    return contract


def gradient_of(spec: LayerSpec) -> Contraction:
    """Σ_n G_n itself."""
    if spec.kind == "embed":
        return _embedding.contractions(spec.in_dim)["gradient"]
    return lambda a, u: jnp.einsum("...nti,...nto->...io", a, u, precision=HIGHEST)
