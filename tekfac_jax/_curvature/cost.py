"""The cheapest order of a contraction: multiplications per example, from static shapes.

Throughout, t is the number of positions, i and o are the dimensions of the two sides, and r and p
are the numbers of kept columns of the two eigenbases.
"""

import itertools
from typing import NamedTuple


class FactorOrder(NamedTuple):
    """Whether Σ G Gᵀ and Σ Gᵀ G are computed from G or from t × t products of positions.

    G Gᵀ = aᵀ(u uᵀ)a and Gᵀ G = uᵀ(a aᵀ)u; with few positions these products are far smaller than G.
    """

    phi_from_gradient: bool
    psi_from_gradient: bool

    def cost(self, t: int, i: int, o: int) -> int:
        """Multiplications."""
        through_positions = t * t * (i + o)
        phi = i * i * o if self.phi_from_gradient else through_positions + t * i * i
        psi = o * o * i if self.psi_from_gradient else through_positions + t * o * o
        return t * i * o * any(self) + phi + psi


class RescalingOrder(NamedTuple):
    """Which sides are rotated early, at every position before G is formed; others late, in G."""

    a_early: bool
    u_early: bool

    def cost(self, t: int, i: int, o: int, r: int, p: int) -> int:
        """Multiplications. If both sides are late, the outputs are rotated first."""
        early = self.a_early * t * i * r + self.u_early * t * o * p
        rows, columns = (r if self.a_early else i), (p if self.u_early else o)
        late = (not self.u_early) * rows * o * p + (not self.a_early) * i * r * p
        return early + t * rows * columns + late


_BOTH = (False, True)


def factor_order(t: int, i: int, o: int) -> FactorOrder:
    """The cheapest order for the factors."""
    orders = itertools.starmap(FactorOrder, itertools.product(_BOTH, _BOTH))
    return min(orders, key=lambda order: order.cost(t, i, o))


def rescaling_order(t: int, i: int, o: int, r: int, p: int) -> RescalingOrder:
    """The cheapest order for Θ."""
    orders = itertools.starmap(RescalingOrder, itertools.product(_BOTH, _BOTH))
    return min(orders, key=lambda order: order.cost(t, i, o, r, p))


def is_formed_once(t: int, i: int, o: int, r: int, p: int) -> bool:
    """Whether forming G once for factors and Θ costs less than the cheapest order of each."""
    late, gradients = RescalingOrder(False, False), FactorOrder(True, True)
    together = gradients.cost(t, i, o) + late.cost(t, i, o, r, p) - t * i * o
    apart = factor_order(t, i, o).cost(t, i, o) + rescaling_order(t, i, o, r, p).cost(t, i, o, r, p)
    return t > 1 and together <= apart
