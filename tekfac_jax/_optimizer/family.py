"""TODO: _optimizer/family"""

from typing import NamedTuple

from tekfac_jax._layers.statistics import FactorKind
from tekfac_jax._optimizer.options import Options
from tekfac_jax._state.layout import STATE_VERSION, StateKind


class Member(NamedTuple):
    """The two switches that tell the family of four apart."""

    plain: bool  # factors A and U instead of the trace-restricted Φ and Ψ
    measured: bool  # Θ measured in the eigenbasis instead of the factors' eigenvalues


def kind_of_factors(member: Member, options: Options) -> FactorKind:
    """Which factors a member of the family keeps."""
    return "plain" if member.plain else options.factors


def _meaning(member: Member, options: Options) -> StateKind:
    location, running = options.factors == "location", options.rescaling == "running"
    return StateKind(STATE_VERSION, member.plain, member.measured, location, running)
