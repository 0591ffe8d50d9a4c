"""The eigenvalues of a layer's curvature, debiased, and whether they are valid."""

from typing import NamedTuple

import jax

from tekfac_jax._state.layout import LayerState, debiased, is_valid, trace_of_theta


class Spectrum(NamedTuple):
    """Eigenvalues of one layer's Fisher block, whose sides keep r and p eigenvectors."""

    theta: jax.Array  # (*lead, r, p) debiased Θ
    rest: jax.Array  # (*lead) debiased trace outside the kept columns
    trace: jax.Array  # (*lead) debiased trace of the whole block
    valid: jax.Array  # (*lead) whether they can precondition a gradient


def spectrum_of(layer: LayerState) -> Spectrum:
    """Reads the eigenvalues from a layer's state."""
    return Spectrum(
        theta=debiased(layer.theta, layer.theta_weight),
        rest=debiased(layer.rest, layer.theta_weight),
        trace=trace_of_theta(layer),
        valid=is_valid(layer),
    )
