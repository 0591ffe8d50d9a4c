"""When each layer's curvature is refreshed: all layers at once, or spread over the interval."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tekfac_jax._curvature.cost import factor_order, rescaling_order
from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._optimizer.options import Number, Options
from tekfac_jax._state.layout import LayerState

_MOST_TRIALS = 2**27  # steps × offsets, for each layer; this many take a fraction of a second
_EXAMPLES = 64  # assumed batch size for the flop counts; only the proportions matter


class Clock(NamedTuple):
    """When the three refreshes of one layer are due; each answer has shape (*lead)."""

    step: jax.Array
    offset: int
    options: Options

    def factors_due(self, layer: LayerState) -> jax.Array:
        """Every T_FIM steps, and at every step until there are factors."""
        return self._at(self.options.factor_interval) | (layer.factor_weight == 0)

    def basis_due(self, layer: LayerState) -> jax.Array:
        """Every T_EIG steps, and at every step until there is a basis; never before the factors.

        The eigenvectors of a zero matrix are arbitrary.
        """
        due = self._at(self.options.eigenbasis_interval) | ~layer.basis_valid
        return due & (layer.factor_weight > 0)

    def rescaling_due(self, layer: LayerState) -> jax.Array:
        """Every T_RE steps, and at every step until there is a Θ."""
        return self._at(self.options.rescaling_interval) | (layer.theta_weight == 0)

    def product_due(self, layer: LayerState) -> jax.Array:
        """Θ as a product of the factors' eigenvalues is also due with each new basis."""
        return self.rescaling_due(layer) | self._at(self.options.eigenbasis_interval)

    def any_due(self, layer: LayerState) -> jax.Array:
        """Whether any refresh is due; `product_due` adds an interval that `basis_due` has too."""
        return self.factors_due(layer) | self.basis_due(layer) | self.rescaling_due(layer)

    def _at(self, interval: Number) -> jax.Array:
        return is_due(self.step, self.offset, interval, early=self.options.early_refreshes)


def is_due(step: jax.Array, offset: int | jax.Array, interval: Number, *, early: bool) -> jax.Array:
    """Whether a refresh is due: once per interval, and with `early` also at steps 1, 2, 4, ...

    Early refreshes ignore the offset, because all layers start from the statistics of step 0. They
    stop after the first interval.
    """
    due = (step - offset) % interval == 0
    if early:
        power_of_two = (step > 0) & (step & (step - 1) == 0)
        due |= power_of_two & (step < interval)
    return due


def next_due(
    count: jax.Array,
    layers: Mapping[str, LayerState],
    options: Options,
    offset: Mapping[str, int],
) -> jax.Array:
    """Whether step `count` will use statistics."""
    intervals = (options.factor_interval, options.eigenbasis_interval, options.rescaling_interval)
    own = jnp.asarray(sorted(set(offset.values())), count.dtype)
    early = options.early_refreshes
    due = [jnp.any(is_due(count, own, interval, early=early)) for interval in intervals]
    missing = [
        jnp.any(~layer.basis_valid | (layer.theta_weight == 0) | (layer.factor_weight == 0))
        for layer in layers.values()
    ]
    return jnp.any(jnp.stack([*due, *missing]))


def layer_offsets(layers: Layers, options: Options) -> dict[str, int]:
    """For each layer, the step (modulo each interval) at which its refreshes are due."""
    if not options.stagger:
        return dict.fromkeys(layers, 0)
    intervals = (options.factor_interval, options.eigenbasis_interval, options.rescaling_interval)
    return offsets(layers, *map(int, intervals))  # `validate` rejects arrays here


def offsets(
    layers: Layers, factor_interval: int, eigenbasis_interval: int, rescaling_interval: int
) -> dict[str, int]:
    """For each layer, the step (modulo each interval) at which its refreshes are due.

    A layer has one offset for all three refreshes, so that they keep the paper's order. The most
    expensive layer is placed first. Each layer gets the offset that keeps its busiest step least
    busy, by flop count.

    Raises:
        ValueError: the least common multiple of the intervals is too large.
    """
    # The load repeats after the least common multiple of the intervals.
    intervals = (factor_interval, eigenbasis_interval, rescaling_interval)
    cycle = math.lcm(*intervals)
    if cycle * max(intervals) > _MOST_TRIALS:
        raise ValueError(
            f"stagger=True would try {max(intervals):,} offsets over {cycle:,} steps, the least "
            f"common multiple of the intervals {intervals}, which takes too long: choose shorter "
            "intervals, or intervals that divide each other (50, 50, 200)"
        )

    # Place the largest costs first: the small ones still fit between them.
    load = np.zeros(cycle)
    costs = {path: _costs(spec) for path, spec in layers.items()}
    found: dict[str, int] = {}
    for path in sorted(costs, key=lambda path: -sum(costs[path])):
        options: list[tuple[float, int, np.ndarray]] = []
        for offset in range(max(intervals)):
            own = np.zeros(cycle)
            for cost, interval in zip(costs[path], intervals, strict=True):
                own[offset % interval :: interval] += cost
            busiest = float(np.max(np.where(own > 0, load + own, 0)))
            options.append((busiest, offset, own))
        _, offset, own = min(options, key=lambda option: option[:2])
        load += own
        found[path] = offset
    return found


def _costs(spec: LayerSpec) -> tuple[float, float, float]:
    """Flop counts of factors, decompositions and Θ."""
    t, i, o, lead = spec.positions, spec.in_dim, spec.out_dim, math.prod(spec.lead)
    if not spec.has_input_basis:  # an example looks up at most `t` rows of an embedding
        i = min(i, t)
    factors = 2 * (factor_order(t, i, o).cost(t, i, o) if t > 1 else i**2 + o**2)
    rescaling = 2 * (rescaling_order(t, i, o, i, o).cost(t, i, o, i, o))
    decompositions = 9 * (i**3 * spec.has_input_basis + o**3)
    return lead * _EXAMPLES * factors, lead * decompositions, lead * _EXAMPLES * rescaling
