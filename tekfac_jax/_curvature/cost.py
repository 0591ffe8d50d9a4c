"""In which order a contraction is cheapest: multiplications for one example, from static shapes.

Throughout t is the number of positions, i and o are the dimensions of the two sides, and r and p
the columns of the two eigenbases that are kept.
"""

import itertools
from typing import NamedTuple


class FactorOrder(NamedTuple):
    """How Σ G Gᵀ and Σ Gᵀ G come about: from G, or from the positions' products, of t × t.

    G Gᵀ = aᵀ(u uᵀ)a and Gᵀ G = uᵀ(a aᵀ)u: where positions are few, G is much larger than both.
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
    """Which sides are rotated early, at every position, before G is formed; the others after it."""

    a_early: bool
    u_early: bool

    def cost(self, t: int, i: int, o: int, r: int, p: int) -> int:
        """Multiplications. Where both sides come late, the outputs are rotated first."""
        early = self.a_early * t * i * r + self.u_early * t * o * p
        rows, columns = (r if self.a_early else i), (p if self.u_early else o)
        late = (not self.u_early) * rows * o * p + (not self.a_early) * i * r * p
        return early + t * rows * columns + late


_BOTH = (False, True)


def factor_order(t: int, i: int, o: int) -> FactorOrder:
    """The cheapest one."""
    orders = itertools.starmap(FactorOrder, itertools.product(_BOTH, _BOTH))
    return min(orders, key=lambda order: order.cost(t, i, o))


def rescaling_order(t: int, i: int, o: int, r: int, p: int) -> RescalingOrder:
    """The cheapest one."""
    orders = itertools.starmap(RescalingOrder, itertools.product(_BOTH, _BOTH))
    return min(orders, key=lambda order: order.cost(t, i, o, r, p))


def is_formed_once(t: int, i: int, o: int, r: int, p: int) -> bool:
    """Whether factors and Θ of one step are cheaper from one G than each by its cheapest order."""
    late, gradients = RescalingOrder(False, False), FactorOrder(True, True)
    together = gradients.cost(t, i, o) + late.cost(t, i, o, r, p) - t * i * o
    apart = factor_order(t, i, o).cost(t, i, o) + rescaling_order(t, i, o, r, p).cost(t, i, o, r, p)
    return t > 1 and together <= apart
