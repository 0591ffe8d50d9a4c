"""The eigenvalues of a layer's curvature, ready for use: debiased, and marked valid or not."""

from typing import NamedTuple

import jax

from tekfac_jax._state.layout import LayerState, debiased, is_valid, trace_of_theta


class Spectrum(NamedTuple):
    """Eigenvalues of one layer's Fisher block; r and p eigenvectors are kept of its two sides."""

    theta: jax.Array  # (*lead, r, p) debiased Θ
    rest: jax.Array  # (*lead) debiased trace outside of the columns that are kept
    trace: jax.Array  # (*lead) of the whole block
    valid: jax.Array  # (*lead) whether a gradient can be preconditioned with these numbers


def spectrum_of(layer: LayerState) -> Spectrum:
    """Reads the eigenvalues from a layer's state."""
    return Spectrum(
        theta=debiased(layer.theta, layer.theta_weight),
        rest=debiased(layer.rest, layer.theta_weight),
        trace=trace_of_theta(layer),
        valid=is_valid(layer),
    )
