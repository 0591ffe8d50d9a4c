"""What a member of the family and its options mean for factors, Θ and the state."""

from typing import Literal

from tekfac_jax._layers.statistics import FactorKind, ReducedStatistics, StatisticsOfBatch
from tekfac_jax._optimizer.options import Options
from tekfac_jax._state.family import Member
from tekfac_jax._state.layout import STATE_VERSION, StateKind

# "new basis": Θ is computed after the basis is refreshed, from captures or from the factors.
# "old basis": Θ was measured before that, in the backward pass (reduced statistics).
# "mini-batch": Θ comes from the mini-batch gradient alone (rescaling="running").
ThetaFrom = Literal["new basis", "old basis", "mini-batch"]


def kind_of_factors(member: Member, options: Options) -> FactorKind:
    """Which factors a member of the family keeps."""
    return "plain" if member.plain else options.factors


def theta_from(member: Member, options: Options, stats: StatisticsOfBatch | None) -> ThetaFrom:
    """Where Θ comes from."""
    if not member.measured:
        return "new basis"
    if options.rescaling == "running":
        return "mini-batch"
    return "old basis" if isinstance(stats, ReducedStatistics) else "new basis"


def state_kind(member: Member, options: Options) -> StateKind:
    """The layout version and the options that define what the averages in the state mean."""
    location, running = options.factors == "location", options.rescaling == "running"
    return StateKind(STATE_VERSION, member.plain, member.measured, location, running)
