"""Says whether a state fits an optimizer and its layers, and whether all of its layers work."""

import numpy as np

from tekfac_jax._curvature.eigenbasis import Basis
from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._layers.types import OptState
from tekfac_jax._state.compare import (
    difference,
    differing_dimensions,
    differing_paths,
    dimensions,
    first_of,
    is_known,
    largest,
    no_factors,
    of_version,
)
from tekfac_jax._state.folding import unfolded
from tekfac_jax._state.layout import LayerState, ScaleByTekfacState
from tekfac_jax._state.recognise import find_states, layer_states


def check_state(opt_state: OptState, layers: Layers, expected: OptState = None) -> str:
    """Says whether a (restored) state fits, and whether all of its layers work.

    Args:
        opt_state: state of any optax transformation that contains one of ours.
        layers: from `find_layers`.
        expected: what ``tx.init(params)`` returns for the optimizer that will continue, or None.
            If given, the options that a state records are compared as well: the member of the
            family, `factors`, `rescaling`, `basis_rank`, `max_dim`, `factor_dtype` and
            `shard_state`. Other options may change from one run to the next.

    Returns:
        A sentence that names the first difference; or says that no statistics have arrived; or
        names the first layer whose factors have yet to be rebuilt (`restore_state`), or that has
        fallen back to its scaled gradient (`max_failures`). The empty string if all is well.

    Raises:
        ValueError: there is no such state inside, or `layers` does not come from `find_layers`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.check_state(opt_state, layers)
        ''
        >>> print(tekfac.check_state(opt_state, layers, tekfac.kfac(0.1, layers).init(params)))
        The state belongs to TEKFAC, but the optimizer is KFAC: the shapes agree, the numbers \
mean something else.
    """
    check_layers(layers)
    return (
        _difference(opt_state, layers)
        or ("" if expected is None else _other_options(opt_state, expected))
        or _without_statistics(opt_state)
        or _not_at_work(opt_state)
    )


def _other_options(opt_state: OptState, expected: OptState) -> str:
    found = find_states(opt_state, ScaleByTekfacState)
    wanted = find_states(expected, ScaleByTekfacState)
    if len(found) != len(wanted):
        return (
            f"The state holds {len(found)} transformations of the family, but {len(wanted)} are "
            "expected."
        )
    return first_of(difference(*pair) for pair in zip(found, wanted, strict=True))


def _without_statistics(opt_state: OptState) -> str:
    """Says whether steps were taken and none of them brought any curvature."""
    for state in find_states(opt_state, ScaleByTekfacState):
        seen = [
            x
            for layer in state.layers.values()
            for x in (layer.factor_weight, layer.theta_weight, layer.failures)
        ]
        steps = largest(state.count) if all(map(is_known, (state.count, *seen))) else 0
        if steps > 0 and not any(map(largest, seen)):
            return (
                f"No usable statistics have arrived so far (step {steps}), so gradients pass "
                "unchanged: pass stats=, the third result of value_grad_and_stats."
            )
    return ""


def _not_at_work(opt_state: OptState) -> str:
    """Names the first layer that lacks factors or has fallen back, in a state of this version."""
    for path, layer in layer_states(opt_state).items():
        if is_known(layer.basis_valid) and _lacks_factors(layer):
            return (
                f"Layer {path!r} has an eigenbasis but no factors: they are rebuilt from the next "
                "statistics, and the basis stays until its next refresh."
            )
        if is_known(layer.fallen_back) and largest(layer.fallen_back):
            return (
                f"Layer {path!r} only scales its gradient: {largest(layer.failed_in_a_row)} "
                "refreshes in a row failed, because statistics or a decomposition were not finite. "
                "It recovers as soon as one succeeds."
            )
    return ""


def _lacks_factors(layer: LayerState) -> bool:
    weight, valid = np.asarray(layer.factor_weight), np.asarray(layer.basis_valid)
    return bool(np.any(valid & (weight == 0)))


def _difference(opt_state: OptState, layers: Layers) -> str:
    """The first difference between a state and the layers of a network."""
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
    return differing_paths(states, layers) or first_of(sizes) or first_of(left_out)


def bases_in(opt_state: OptState, layers: Layers) -> dict[str, Basis]:
    """The eigenbasis of each layer; raises if the state does not fit these layers."""
    if found := _difference(opt_state, layers):
        raise ValueError(f"opt_state does not fit the layers: {found}")
    states = {path: unfolded(layer) for path, layer in layer_states(opt_state).items()}
    return {path: Basis(states[path].q_phi, states[path].q_psi) for path in layers}
