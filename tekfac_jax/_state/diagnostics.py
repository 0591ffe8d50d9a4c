"""Scalars to log: the health of the curvature, and what one step did to each layer."""

# pyright: reportUnknownMemberType=false
# JAX leaves `jnp.linalg.norm` and parameters of `jnp.zeros` untyped.

from typing import cast

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.decomposition import residual
from tekfac_jax._curvature.eigenbasis import eigenvalues_in
from tekfac_jax._layers.matrices import to_matrices
from tekfac_jax._layers.spec import Layers, at_least_float32, check_layers
from tekfac_jax._layers.types import OptState, Params
from tekfac_jax._state.layout import ClipByKlState, LayerState, trace_of_theta, unit_trace
from tekfac_jax._state.recognise import search, whole_layers


def diagnostics(opt_state: OptState) -> dict[str, jax.Array]:
    """What to log: a flat dict of scalar arrays.

    Args:
        opt_state: state of any optax transformation that contains one of ours.

    Returns:
        ``{path}/trace`` (tr Θ), ``{path}/kept`` (the share of it in the kept columns, see
        `basis_rank`), ``{path}/damping`` (λ of the last step), ``{path}/phi_spread`` and
        ``{path}/psi_spread`` (largest over mean eigenvalue of Φ, Ψ), ``{path}/phi_residual`` and
        ``{path}/psi_residual`` (‖ΦQ − QΛ‖ / ‖Φ‖: how far the factor has moved away from the
        current basis), ``{path}/failures`` (non-finite statistics and decompositions so far),
        ``{path}/failed_in_a_row`` (consecutive failures of the kind of refresh that fails most;
        see `max_failures`), and, with `clip_by_kl`, ``kl_clip`` (the factor that multiplied the
        last step). Over stacked layers and groups, traces and failures are summed, ``kept`` is
        the minimum, and the rest are maxima.

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

    scalars: dict[str, jax.Array] = {}
    for path, layer in whole_layers(opt_state).items():
        scalars |= {
            f"{path}/trace": jnp.sum(trace_of_theta(layer)),
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


def _kept_share(layer: LayerState) -> jax.Array:
    """The smallest share of a trace that lies in the kept columns; 1 while the trace is zero."""
    kept = jnp.sum(layer.theta, axis=(-2, -1))
    total = kept + layer.rest
    return jnp.min(jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), 1))


def step_diagnostics(
    layers: Layers, params: Params, grads: Params, updates: Params
) -> dict[str, jax.Array]:
    """What one step did to each layer: a flat dict of scalar arrays, for a logger.

    A pure function of quantities that a training step has at hand; call it inside `jax.jit`.
    Kernel and bias of a layer, together the matrix W of shape (*lead, in[+1], out), are compared
    as one vector.

    Args:
        layers: from `find_layers`.
        params: the parameters before the step.
        grads: the gradient, in the structure of `params`; its scale does not matter.
        updates: what is added to `params`, from any optimizer's ``tx.update``. After
            ``apply_gradients``: the new parameters minus the old ones.

    Returns:
        ``{path}/update_ratio``, ‖ΔW‖ / ‖W‖ (infinite if all weights are zero and the update is
        not), and ``{path}/angle``, in degrees, between the update and the negative gradient: 0 is
        gradient descent, below 90 the step goes downhill, and NaN means that the gradient or the
        update is zero. Over stacked layers and groups, both are maxima. Layers that are masked
        out of one of the three trees are omitted.

    Raises:
        ValueError: a layer's parameter is missing from one of the trees, or has another shape.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3, use_bias=False), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> loss_fn = lambda p, x: jnp.square(model.apply(p, x)).mean()
        >>> layers = tekfac.find_layers(loss_fn, params, x)
        >>> grads = jax.grad(loss_fn)(params, x)
        >>> updates = jax.tree.map(lambda w: -0.01 * w, params)  # weight decay alone
        >>> step = tekfac.step_diagnostics(layers, params, grads, updates)
        >>> f"{step['params/update_ratio']:.4f}", bool(step["params/angle"] < 90)
        ('0.0100', True)
    """
    check_layers(layers)
    weights = _matrices("params", params, layers)
    gradients = _matrices("grads", grads, layers)
    steps = _matrices("updates", updates, layers)
    scalars: dict[str, jax.Array] = {}
    for path in layers:
        if path in weights and path in gradients and path in steps:
            scalars[f"{path}/update_ratio"] = jnp.max(_ratio(steps[path], weights[path]))
            scalars[f"{path}/angle"] = _largest_angle(steps[path], -gradients[path])
    return scalars


def _matrices(argument: str, tree: Params, layers: Layers) -> dict[str, jax.Array]:
    """The matrix of each layer, in at least float32."""
    try:
        found = to_matrices(tree, layers)
    except ValueError as error:
        raise ValueError(f"{argument!r} must have the form of a gradient: {error}") from error
    return {path: x.astype(at_least_float32(x.dtype)) for path, x in found.items()}


def _direction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x / ‖x‖, ‖x‖) of each matrix, scaled first so that no square over- or underflows."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    scaled = x / jnp.where(largest == 0, 1, largest)
    norm = _norm(scaled)[..., None, None]
    return scaled / jnp.where(norm == 0, 1, norm), (largest * norm)[..., 0, 0]


def _norm(x: jax.Array) -> jax.Array:
    return cast(jax.Array, jnp.linalg.norm(x, axis=(-2, -1)))


def _ratio(step: jax.Array, weight: jax.Array) -> jax.Array:
    """‖step‖ / ‖weight‖ of each matrix."""
    (_, length), (_, size) = _direction(step), _direction(weight)
    return jnp.where(length == 0, 0, length / size)


def _largest_angle(x: jax.Array, y: jax.Array) -> jax.Array:
    """The largest angle between two matrices of a stack, in degrees; NaN if no pair has one."""
    (x, x_norm), (y, y_norm) = _direction(x), _direction(y)
    # The arc cosine would lose half of the digits near 0 and 180 degrees.
    apart, along = _norm(x - y), _norm(x + y)
    angles = jnp.degrees(2 * jnp.arctan2(apart, along))
    is_defined = (x_norm != 0) & (y_norm != 0)
    largest = jnp.max(jnp.where(is_defined, angles, -1))
    return jnp.where(largest < 0, jnp.nan, largest)
