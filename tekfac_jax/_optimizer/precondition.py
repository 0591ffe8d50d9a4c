"""Preconditions the gradients with the damped curvature, layer by layer."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tekfac_jax._curvature import eigenbasis
from tekfac_jax._curvature.equal_shapes import by_shape
from tekfac_jax._optimizer.damping import by_factors
from tekfac_jax._optimizer.options import Options
from tekfac_jax._optimizer.spectrum import Spectrum
from tekfac_jax._state.family import Member
from tekfac_jax._state.layout import LayerState, expand_lead


def precondition(
    gradients: Mapping[str, jax.Array],
    held: Mapping[str, LayerState],
    spectra: Mapping[str, Spectrum],
    member: Member,
    options: Options,
) -> dict[str, jax.Array]:
    """Q_Φ [(Q_Φᵀ G Q_Ψ) / (Θ + λ)] Q_Ψᵀ for each layer that has a gradient (Eq. 3.9)."""

    def theta_of(path: str) -> jax.Array:
        if options.damping_form == "exact":
            return spectra[path].theta
        return by_factors(spectra[path].theta, held[path].damping, plain=member.plain)

    operands = {
        path: (
            gradient.astype(spectra[path].theta.dtype), held[path].q_phi, held[path].q_psi,
            theta_of(path), spectra[path].rest, held[path].damping,
        )
        for path, gradient in gradients.items()
    }  # fmt: skip
    with jax.named_scope("tekfac precondition"):
        natural = by_shape(eigenbasis.precondition, operands)
    return {
        path: _direction(gradient, natural[path], held[path], spectra[path])
        for path, gradient in gradients.items()
    }


def has_fallen_back(layer: LayerState, options: Options) -> jax.Array:
    """Whether refreshes failed so often in a row that the layer only scales its gradient."""
    if options.max_failures is None:
        return jnp.zeros_like(layer.fallen_back)
    return jnp.any(layer.failed_in_a_row >= options.max_failures, axis=-1)


def _direction(
    gradient: jax.Array, natural: jax.Array, layer: LayerState, spectrum: Spectrum
) -> jax.Array:
    """The natural gradient; G / (mean eigenvalue + λ) after a fallback; G without curvature."""
    mean = spectrum.trace / (gradient.shape[-2] * gradient.shape[-1])
    scaled = gradient.astype(mean.dtype) / expand_lead(mean + layer.damping, gradient)
    best = jnp.where(expand_lead(layer.fallen_back, gradient), scaled, natural)
    return jnp.where(expand_lead(spectrum.valid, gradient), best.astype(gradient.dtype), gradient)
