"""What a member of the family and its options say about factors, Θ and the state."""

from typing import Literal

from tekfac_jax._layers.statistics import FactorKind, ReducedStatistics, StatisticsOfBatch
from tekfac_jax._optimizer.options import Options
from tekfac_jax._state.family import Member
from tekfac_jax._state.layout import STATE_VERSION, StateKind

# Θ is computed in the basis after its refresh (from captures or the factors), was measured in the
# basis before the step (reduced statistics), or comes from the mini-batch gradient alone.
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
    """What gives the averages in the state their meaning."""
    location, running = options.factors == "location", options.rescaling == "running"
    return StateKind(STATE_VERSION, member.plain, member.measured, location, running)
