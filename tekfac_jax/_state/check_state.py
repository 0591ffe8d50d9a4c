"""TODO: _state/check_state"""

from typing import Any

import numpy as np

from tekfac_jax._curvature.eigenbasis import Basis
from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._state.compare import (
    difference,
    differing_dimensions,
    differing_paths,
    dimensions,
    is_known,
    largest,
    no_factors,
    of_version,
)
from tekfac_jax._state.folding import unfolded
from tekfac_jax._state.layout import LayerState, ScaleByTekfacState
from tekfac_jax._state.recognise import find_states, layer_states


def check_state(opt_state: Any, layers: Layers, expected: Any = None) -> str:
    """Says whether a (restored) state fits, and whether all of its layers work.

    Args:
        opt_state: state of any optax transformation that contains one of ours.
        layers: from `find_layers`.
        expected: what ``tx.init(params)`` returns of the optimizer that is to go on with it, or
            None. With it the options are compared as well, as far as they show in a state: the
            member of the family, `factors`, `rescaling`, `basis_rank`, `max_dim`, `factor_dtype`
            and `shard_state`; others may change from one run to the next.

    Returns:
        A sentence: the first difference; or that no statistics have come; or the first layer
        whose factors are still to be built anew (`restore_state`) or that has fallen back to its
        scaled gradient (`max_failures`). The empty string if there is nothing to say.

    Raises:
        ValueError: there is no such state inside, or `layers` is something else.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.check_state(opt_state, layers)
        ''
        >>> print(tekfac.check_state(opt_state, layers, tekfac.kfac(0.1, layers).init(params)))
        The state is that of TEKFAC, and the optimizer is KFAC: the shapes are the same, the \
numbers are not.
    """
    check_layers(layers)
    return (
        _difference(opt_state, layers)
        or ("" if expected is None else _other_options(opt_state, expected))
        or _without_statistics(opt_state)
        or _not_at_work(opt_state)
    )


def _other_options(opt_state: Any, expected: Any) -> str:
    found, wanted = (
        find_states(opt_state, ScaleByTekfacState),
        find_states(expected, ScaleByTekfacState),
    )
    if len(found) != len(wanted):
        return (
            f"{len(found)} transformations of the family are in the state, {len(wanted)} expected."
        )
    return next(filter(None, map(difference, found, wanted)), "")


def _without_statistics(opt_state: Any) -> str:
    """Whether there have been steps, and no curvature has come with any of them."""
    for state in find_states(opt_state, ScaleByTekfacState):
        seen = [
            x
            for layer in state.layers.values()
            for x in (layer.factor_weight, layer.theta_weight, layer.failures)
        ]
        steps = largest(state.count) if all(map(is_known, (state.count, *seen))) else 0
        if steps > 0 and not any(map(largest, seen)):
            return (
                f"No statistics that count have come so far (step {steps}), and gradients pass as "
                "they are: pass stats=, the third result of value_grad_and_stats."
            )
    return ""


def _not_at_work(opt_state: Any) -> str:
    """Of a state of this version: the first layer that lacks factors, or has fallen back."""
    for path, layer in layer_states(opt_state).items():
        if is_known(layer.basis_valid) and _lacks_factors(layer):
            return (
                f"Layer {path!r} has an eigenbasis and no factors: they are built anew from the "
                "next statistics, and the basis stays until its next refresh."
            )
        if is_known(layer.fallen_back) and largest(layer.fallen_back):
            return (
                f"Layer {path!r} only scales its gradient: {largest(layer.failed_in_a_row)} "
                "refreshes failed one after another, since statistics or a decomposition were not "
                "finite. It goes on as before when one succeeds."
            )
    return ""


def _lacks_factors(layer: LayerState) -> bool:
    weight, valid = np.asarray(layer.factor_weight), np.asarray(layer.basis_valid)
    return bool(np.any(valid & (weight == 0)))


def _difference(opt_state: Any, layers: Layers) -> str:
    for state in find_states(opt_state, ScaleByTekfacState):
        if found := of_version(state):
            return found
    states = layer_states(opt_state)
    sizes = (
        differing_dimensions(
            path, dimensions(states[path]), (*spec.lead, spec.in_dim, spec.out_dim)
        )
        for path, spec in layers.items()
    )
    left_out = (no_factors(path, layer) for path, layer in states.items())
    return (
        differing_paths(states, layers)
        or next(filter(None, sizes), "")
        or next(filter(None, left_out), "")
    )


def bases_in(opt_state: Any, layers: Layers) -> dict[str, Basis]:
    """The eigenbasis of each layer; raises if the state is not of these layers."""
    if found := _difference(opt_state, layers):
        raise ValueError(f"opt_state does not fit the layers: {found}")
    states = {path: unfolded(layer) for path, layer in layer_states(opt_state).items()}
    return {path: Basis(states[path].q_phi, states[path].q_psi) for path in layers}
