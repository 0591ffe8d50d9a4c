"""How to read our state inside any optax state, however deep."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tekfac_jax._compatibility import (
    difference,
    differing_dimensions,
    differing_paths,
    dimensions,
    is_known,
    largest,
    no_factors,
    not_a_state,
    of_version,
)
from tekfac_jax._decomposition import residual
from tekfac_jax._eigenbasis import eigenvalues_in, outside
from tekfac_jax._layers import Layers, check_layers
from tekfac_jax._reduced import Basis
from tekfac_jax._state import (
    ClipByKlState,
    LayerState,
    ScaleByTekfacState,
    debiased,
    unfolded,
    unit_trace,
)


class Curvature(NamedTuple):
    """Curvature of one layer: F ≈ (Q_Φ⊗Q_Ψ) diag(Θ) (Q_Φ⊗Q_Ψ)ᵀ, or δ Φ⊗Ψ. All debiased.

    `lead` are the axes of stacked layers and of groups, () for any other.

    Attributes:
        delta: δ, the trace of the Fisher block. Shape (*lead).
        phi: Φ, trace 1, (*lead, in[+1], in[+1]).
        psi: Ψ, trace 1, (*lead, out, out).
        q_phi: eigenvectors of Φ in columns, (*lead, in[+1], in[+1]). Of an embedding None, the
            identity, and `phi` is the diagonal of Φ, (*lead, in).
        q_psi: eigenvectors of Ψ in columns, (*lead, out, out).
        theta: Θ, (*lead, in[+1], out).
        theta_rest: θ⊥, which stands for Θ outside of the columns that are kept (`basis_rank`; then
            there are fewer columns of `q_phi` and `q_psi`, and fewer numbers in `theta`). Zero
            where all are kept. Shape (*lead).
    """

    delta: jax.Array
    phi: jax.Array
    psi: jax.Array
    q_phi: jax.Array | None
    q_psi: jax.Array
    theta: jax.Array
    theta_rest: jax.Array


def curvature(opt_state: Any) -> dict[str, Curvature]:
    """The curvature held in an optax state, however deep.

    Args:
        opt_state: state of any optax transformation that contains one of ours, or a train state.

    Returns:
        For each layer path its `Curvature`, debiased, Φ and Ψ with trace 1 (I/dim while there
        is nothing). In KFAC and EKFAC δ = tr A · tr U, Φ = A / tr A, Ψ = U / tr U. In KFAC and
        TKFAC Θ = δ · max(λ_Φ, 0) ⊗ max(λ_Ψ, 0), as of the last refresh.

    Raises:
        ValueError: there is no such state inside.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.curvature(opt_state)["params"].theta.shape
        (6, 3)
    """

    def read(layer: LayerState) -> Curvature:
        return Curvature(
            delta=layer.delta,
            phi=unit_trace(layer.phi, layer.q_phi),
            psi=unit_trace(layer.psi, layer.q_psi),
            q_phi=layer.q_phi,
            q_psi=layer.q_psi,
            theta=(theta := debiased(layer.theta, layer.theta_weight)),
            theta_rest=outside(
                theta, debiased(layer.rest, layer.theta_weight), (layer.q_phi, layer.q_psi)
            ),
        )

    return {path: read(layer) for path, layer in _whole_layers(opt_state).items()}


def stats_due(opt_state: Any) -> jax.Array:
    """Whether the next step would use statistics: a factor, basis or Θ refresh is due.

    For loops that compile a second step without statistics. A step that gets none although they
    are due leaves the curvature as it is until the next interval begins.

    Args:
        opt_state: state of any optax transformation that contains one of ours.

    Returns:
        Boolean array of shape ().

    Raises:
        ValueError: there is no such state inside.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> bool(tekfac.stats_due(opt_state))  # nothing is known yet
        True
    """
    return jnp.any(jnp.stack([state.due for state in _find(opt_state, ScaleByTekfacState)]))


def memory_usage(opt_state: Any) -> dict[str, dict[str, int]]:
    """Bytes of curvature state, for each layer: ``factors``, ``eigenbasis``, ``rescaling``.

    Args:
        opt_state: state of any optax transformation that contains one of ours; shapes suffice.

    Returns:
        Layer path -> kind -> bytes.

    Raises:
        ValueError: there is no such state inside.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> tekfac.memory_usage(opt_state)
        {'params': {'factors': 180, 'eigenbasis': 180, 'rescaling': 72}}
    """

    def size(*arrays: Any) -> int:
        return sum(
            math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays if x is not None
        )

    return {
        path: {
            "factors": size(layer.phi, layer.psi),
            "eigenbasis": size(layer.q_phi, layer.q_psi),
            "rescaling": size(layer.theta),
        }
        for path, layer in _layer_states(opt_state).items()
    }


def diagnostics(opt_state: Any) -> dict[str, jax.Array]:
    """What to log: a flat dict of scalar arrays.

    Args:
        opt_state: state of any optax transformation that contains one of ours.

    Returns:
        ``{path}/trace`` (tr Θ), ``{path}/kept`` (its share in the columns that are kept, see
        `basis_rank`), ``{path}/damping`` (λ of the last step), ``{path}/phi_spread`` and
        ``{path}/psi_spread`` (largest eigenvalue of Φ, Ψ over their mean), ``{path}/phi_residual``
        and ``{path}/psi_residual`` (‖ΦQ − QΛ‖ / ‖Φ‖: how far the factor has moved away from the
        basis in force), ``{path}/failures``
        (non-finite statistics and decompositions so far), ``{path}/failed_in_a_row`` (of late, of
        the kind of refresh that fails most; see `max_failures`), and ``kl_clip`` (what the last
        step was multiplied by) where `clip_by_kl` is in use. Of stacked layers and groups the sum
        of the traces and failures, the least of the shares, and the largest of the others.

    Raises:
        ValueError: there is no such state inside.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> for name, value in tekfac.diagnostics(opt_state).items():
        ...     print(name, value)
        params/trace 0.0
        params/kept 1.0
        params/damping 0.0
        params/phi_spread 0.0
        params/psi_spread 0.0
        params/phi_residual 0.0
        params/psi_residual 0.0
        params/failures 0
        params/failed_in_a_row 0
        kl_clip 1.0
    """

    def spread(factor: jax.Array, q: jax.Array | None) -> jax.Array:
        return jnp.max(eigenvalues_in(unit_trace(factor, q), q)) * factor.shape[-1]

    def stale(factor: jax.Array, q: jax.Array | None) -> jax.Array:
        if q is None:
            return jnp.zeros((), factor.dtype)
        return jnp.max(residual(unit_trace(factor, q), q))

    scalars = {}
    for path, layer in _whole_layers(opt_state).items():
        scalars |= {
            f"{path}/trace": jnp.sum(
                debiased(jnp.sum(layer.theta, (-2, -1)) + layer.rest, layer.theta_weight)
            ),
            f"{path}/kept": _kept_share(layer),
            f"{path}/damping": jnp.max(layer.damping),
            f"{path}/phi_spread": spread(layer.phi, layer.q_phi),
            f"{path}/psi_spread": spread(layer.psi, layer.q_psi),
            f"{path}/phi_residual": stale(layer.phi, layer.q_phi),
            f"{path}/psi_residual": stale(layer.psi, layer.q_psi),
            f"{path}/failures": jnp.sum(layer.failures),
            f"{path}/failed_in_a_row": jnp.max(layer.failed_in_a_row),
        }
    for clip in search(opt_state, ClipByKlState):
        scalars["kl_clip"] = clip.factor
    return scalars


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
    found, wanted = _find(opt_state, ScaleByTekfacState), _find(expected, ScaleByTekfacState)
    if len(found) != len(wanted):
        return (
            f"{len(found)} transformations of the family are in the state, {len(wanted)} expected."
        )
    return next(filter(None, map(difference, found, wanted)), "")


def _without_statistics(opt_state: Any) -> str:
    """Whether there have been steps, and no curvature has come with any of them."""
    for state in _find(opt_state, ScaleByTekfacState):
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
    for path, layer in _layer_states(opt_state).items():
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
    for state in _find(opt_state, ScaleByTekfacState):
        if found := of_version(state):
            return found
    states = _layer_states(opt_state)
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


def _kept_share(layer: LayerState) -> jax.Array:
    """The least share of a trace that lies in the columns that are kept; 1 while it is zero."""
    kept = jnp.sum(layer.theta, axis=(-2, -1))
    total = kept + layer.rest
    return jnp.min(jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), 1))


def bases_in(opt_state: Any, layers: Layers) -> dict[str, Basis]:
    """The eigenbasis of each layer; raises if the state is not of these layers."""
    if found := _difference(opt_state, layers):
        raise ValueError(f"opt_state does not fit the layers: {found}")
    states = {path: unfolded(layer) for path, layer in _layer_states(opt_state).items()}
    return {path: Basis(states[path].q_phi, states[path].q_psi) for path in layers}


def _layer_states(opt_state: Any) -> dict[str, LayerState]:
    states: dict[str, LayerState] = {}
    for state in _find(opt_state, ScaleByTekfacState):
        states |= state.layers
    return states


def _whole_layers(opt_state: Any) -> dict[str, LayerState]:
    """The layers with their matrices as such; raises if factors are left out."""
    states = _layer_states(opt_state)
    if missing := next(filter(None, (no_factors(p, layer) for p, layer in states.items())), ""):
        raise ValueError(missing)
    return {path: unfolded(layer) for path, layer in states.items()}


def _find(opt_state: Any, kind: type) -> list[Any]:
    found = search(opt_state, kind)
    if not found:
        raise ValueError(
            "there is no state of scale_by_tekfac or a sibling in this optimizer state "
            f"({type(opt_state).__name__}); pass what tx.init or tx.update returned"
        )
    for state in found:
        if kind is ScaleByTekfacState and (broken := not_a_state(state)):
            raise ValueError(broken)
    return found


def search(opt_state: Any, kind: type) -> list[Any]:
    """All states of that type in an optax state, however deep."""
    # A clip's state contains the state that it wraps: stop only at the kind that is looked for.
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    return jax.tree.map(lambda x: x.__jax_array__() if _refers(x) else x, found, is_leaf=_refers)


def _refers(node: Any) -> bool:
    """Whether an array is kept in an object, as `nnx.Optimizer` keeps those of its state."""
    return hasattr(node, "__jax_array__") and not isinstance(node, jax.Array)
