"""What the statistics of a function come as: raw, or contracted in the backward pass."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from tekfac_jax._arguments import check_choice, check_condition
from tekfac_jax._capture.plan import Captures, Plan
from tekfac_jax._capture.reduced import Reduction
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.statistics import FactorKind, Statistics
from tekfac_jax._state.check_state import bases_in

Mode = Literal["raw", "reduced"]


class Raw(NamedTuple):
    """Keeps every capture as it is; the counterpart of `Reduction`."""

    plan: Plan
    scale: jax.Array  # what u is multiplied by to become the gradient of the summed loss
    examples: jax.Array  # that count

    def slots(self) -> Captures:
        return self.plan.slots()

    def run(self, params: Any, slots: Captures) -> Any:
        return self.plan.run(params, slots)

    def finish(self, found: Captures) -> Statistics:
        """Statistics from what the slots received."""
        return Statistics(found, self.scale, self.examples, jnp.ones_like(self.scale))


# From a plan, the scale of the loss and the number of examples that count to what runs the
# function and finishes its statistics.
Gatherer = Callable[[Plan, jax.Array, jax.Array], Raw | Reduction]


def gathering_function(
    gather: Callable[[Gatherer, Any, Any, Any], Any],
    layers: Layers,
    mode: Mode,
    factors: FactorKind,
) -> Callable[..., Any]:
    """A function of (params, *args, **kwargs); reduced statistics take two further arguments.

    Args:
        gather: from what gathers statistics, params, args and kwargs to the result.
        layers: from `find_layers`.
        mode: ``"raw"`` or ``"reduced"``.
        factors: of reduced statistics.

    Raises:
        ValueError: unknown `mode` or `factors`.
    """
    check_choice("mode", mode, get_args(Mode))
    check_choice("factors", factors, get_args(FactorKind))

    def raw(params: Any, *args: Any, **kwargs: Any) -> Any:
        return gather(Raw, params, args, kwargs)

    def reduced(
        params: Any, *args: Any, opt_state: Any = None, when: Any = True, **kwargs: Any
    ) -> Any:
        check_condition("when", when)
        bases = None if opt_state is None else bases_in(opt_state, layers)

        def reduction(plan: Plan, scale: jax.Array, examples: jax.Array) -> Reduction:
            due = jnp.asarray(when, bool)
            return Reduction(plan, layers, factors, bases, scale, examples, due)

        return gather(reduction, params, args, kwargs)

    return raw if mode == "raw" else reduced
