"""Chooses the contractions for each kind of layer."""

import math
from collections.abc import Sequence

import jax

from tekfac_jax._curvature import cost, dense, embedding, normalisation
from tekfac_jax._curvature.chunks import Contraction, positions_of
from tekfac_jax._curvature.dense import Contractions, Factors, Rescaling
from tekfac_jax._layers.spec import LayerSpec
from tekfac_jax._layers.statistics import Capture, FactorKind

_FORMED = 2**24  # the most numbers that the G_n of one layer may have
FORMED_IN_ALL = 2**27  # the same for all layers whose G_n are kept at the same time


def factors_of(spec: LayerSpec, kind: FactorKind) -> Contraction[Factors]:
    """The two factors of a layer: exact or location (Φ and Ψ), or plain (A and U)."""
    return getattr(_contractions_of(spec), kind)


def rescaling_of(
    spec: LayerSpec, q_phi: jax.Array | None, q_psi: jax.Array
) -> Contraction[Rescaling]:
    """Θ in a basis, and the rest outside of it; `q_phi` is None for an embedding."""

    def theta(a: jax.Array, u: jax.Array) -> jax.Array:
        if q_phi is None:
            if spec.attended:
                return embedding.attended_rescaling(a, u, q_psi)
            return embedding.rescaling(a, u, q_psi, spec.in_dim)
        if spec.kind == "norm":
            return normalisation.rescaling(a, u, q_phi)
        return dense.rescaling(a, u, q_phi, q_psi)

    def norms(a: jax.Array, u: jax.Array) -> jax.Array:
        if q_phi is None and not spec.attended:
            return embedding.squared_norms(a, u, spec.in_dim)
        return dense.squared_norms(a, u)

    def contract(a: jax.Array, u: jax.Array) -> Rescaling:
        return dense.with_rest(spec, theta(a, u), lambda: norms(a, u))

    return contract


def numbers_formed_once(
    spec: LayerSpec, captures: Sequence[Capture], theta_shape: tuple[int, ...]
) -> int:
    """The size of the G_n that give both exact factors and Θ, if that is cheaper.

    Returns:
        How many numbers are kept between the two; 0 if each is contracted by itself.
    """
    if spec.kind not in ("dense", "conv"):
        return 0
    n, layers = captures[0].u.shape[len(spec.stack)], math.prod(spec.lead)
    numbers = layers * n * spec.in_dim * spec.out_dim
    t = positions_of(spec, captures)
    r, p = theta_shape[-2:]
    pays = cost.is_formed_once(t, spec.in_dim, spec.out_dim, r, p)
    return numbers if pays and numbers <= _FORMED else 0


def gradient_of(spec: LayerSpec) -> Contraction[jax.Array]:
    """Σ_n G_n itself."""
    return _contractions_of(spec).gradient


def _contractions_of(spec: LayerSpec) -> Contractions:
    if spec.kind == "norm":
        return normalisation.contractions(spec.use_bias)
    if spec.kind == "embed" and spec.attended:
        return embedding.attended_contractions()
    if spec.kind == "embed":
        return embedding.contractions(spec.in_dim)
    return dense.contractions()
