"""Which contraction serves which kind of layer."""

from typing import Literal

import jax

from tekfac_jax import _embedding, _norms, _statistics
from tekfac_jax._layers import LayerSpec
from tekfac_jax._statistics import Contraction

Factors = Literal["exact", "location", "plain"]


def factors_of(spec: LayerSpec, kind: Factors) -> Contraction:
    """The two factors of a layer: exact or location (Φ and Ψ), or plain (A and U)."""
    return _contractions_of(spec)[kind]


def rescaling_of(spec: LayerSpec, q_phi: jax.Array | None, q_psi: jax.Array) -> Contraction:
    """Θ in a basis; `q_phi` is None for an embedding."""

    def contract(a: jax.Array, u: jax.Array) -> jax.Array:
        if q_phi is None:
            if spec.attended:
                return _embedding.attended_rescaling(a, u, q_psi)
            return _embedding.rescaling(a, u, q_psi, spec.in_dim)
        if spec.kind == "norm":
            return _norms.rescaling(a, u, q_phi)
        return _statistics.rescaling(a, u, q_phi, q_psi)

    return contract


def gradient_of(spec: LayerSpec) -> Contraction:
    """Σ_n G_n itself."""
    return _contractions_of(spec)["gradient"]


def _contractions_of(spec: LayerSpec) -> dict[str, Contraction]:
    """By name."""
    if spec.kind == "norm":
        return _norms.contractions(spec.use_bias)
    if spec.kind == "embed" and spec.attended:
        return _embedding.attended_contractions()
    if spec.kind == "embed":
        return _embedding.contractions(spec.in_dim)
    return {
        "exact": _statistics.exact_factors,
        "location": _statistics.location_factors,
        "plain": _statistics.plain_factors,
        "gradient": _statistics.gradient,
    }
