"""The two forms of statistics: raw captures, or sums formed in the backward pass."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp

from tekfac_jax._arguments import check_choice, check_condition
from tekfac_jax._capture.plan import Captures, Plan
from tekfac_jax._capture.reduced import ReducedCollector
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.statistics import FactorKind, Statistics, StatisticsOfBatch
from tekfac_jax._layers.types import OptState, Params, PyTree
from tekfac_jax._state.check_state import bases_in

Mode = Literal["raw", "reduced"]
R = TypeVar("R")


class Collector(Protocol):
    """Runs a planned function with slots and turns what they receive into statistics."""

    def slots(self) -> PyTree:
        """Zeros, by layer path: differentiate `run` with respect to them."""
        ...

    def run(self, params: Params, slots: PyTree) -> PyTree:
        """The function's output, with a tag on each call of a layer."""
        ...

    def finish(self, found: PyTree) -> StatisticsOfBatch:
        """Statistics from what the slots received."""
        ...


# From a plan, the scale of `u` and the number of examples that count.
MakeCollector: TypeAlias = Callable[[Plan, jax.Array, jax.Array], Collector]


class RawCollector(NamedTuple):
    """Keeps every capture as it is."""

    plan: Plan
    scale: jax.Array  # factor that turns u into the gradient of the summed loss
    examples: jax.Array  # how many examples count

    def slots(self) -> Captures:
        """Zeros in the shapes of the captures."""
        return self.plan.slots()

    def run(self, params: Params, slots: Captures) -> PyTree:
        """The function's output, with a tag on each call of a layer."""
        return self.plan.run(params, slots)

    def finish(self, found: Captures) -> Statistics:
        """Statistics from what the slots received."""
        return Statistics(found, self.scale, self.examples, jnp.ones_like(self.scale))


def statistics_function(
    run: Callable[[MakeCollector, Params, tuple[object, ...], dict[str, object]], R],
    layers: Layers,
    mode: Mode,
    factors: FactorKind,
) -> Callable[..., R]:
    """A function of (params, *args, **kwargs); reduced statistics take two further arguments.

    Args:
        run: function of (make_collector, params, args, kwargs) that returns the result.
        layers: from `find_layers`.
        mode: ``"raw"`` or ``"reduced"``.
        factors: which factors reduced statistics hold.

    Raises:
        ValueError: unknown `mode` or `factors`.
    """
    check_choice("mode", mode, get_args(Mode))
    check_choice("factors", factors, get_args(FactorKind))

    def raw(params: Params, *args: object, **kwargs: object) -> R:
        return run(RawCollector, params, args, kwargs)

    def reduced(
        params: Params,
        *args: object,
        opt_state: OptState = None,
        when: bool | jax.Array = True,
        **kwargs: object,
    ) -> R:
        check_condition("when", when)
        bases = None if opt_state is None else bases_in(opt_state, layers)

        def make_collector(plan: Plan, scale: jax.Array, examples: jax.Array) -> ReducedCollector:
            due = jnp.asarray(when, bool)
            return ReducedCollector(plan, layers, factors, bases, scale, examples, due)

        return run(make_collector, params, args, kwargs)

    return raw if mode == "raw" else reduced
