"""What a step did to each layer: how far it went, and how far from the gradient it turned."""

from typing import Any

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.decomposition import residual
from tekfac_jax._curvature.eigenbasis import eigenvalues_in
from tekfac_jax._layers.matrices import to_matrices
from tekfac_jax._layers.spec import Layers, at_least_float32, check_layers
from tekfac_jax._state.layout import ClipByKlState, LayerState, debiased, unit_trace
from tekfac_jax._state.recognise import search, whole_layers


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
    for path, layer in whole_layers(opt_state).items():
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


def _kept_share(layer: LayerState) -> jax.Array:
    """The least share of a trace that lies in the columns that are kept; 1 while it is zero."""
    kept = jnp.sum(layer.theta, axis=(-2, -1))
    total = kept + layer.rest
    return jnp.min(jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), 1))


def step_diagnostics(layers: Layers, params: Any, grads: Any, updates: Any) -> dict[str, jax.Array]:
    """What one step did to each layer: a flat dict of scalar arrays, for a logger.

    A pure function of what a training step has at hand, to be called inside of `jax.jit`. The
    kernel and bias of a layer, together the matrix W of shape (*lead, in[+1], out), are compared
    as vectors.

    Args:
        layers: from `find_layers`.
        params: the parameters before the step.
        grads: the gradient, in the structure of `params`. A multiple of it gives the same.
        updates: what is added to `params`, from ``tx.update`` (any optimizer's). After
            ``apply_gradients``: the new parameters minus the old ones.

    Returns:
        ``{path}/update_ratio``, ‖ΔW‖ / ‖W‖ (infinite where all weights are zero and the update
        is not), and ``{path}/angle``, in degrees, between the update and the negative gradient: 0
        is gradient descent, and below 90 the step goes downhill. NaN where the gradient or
        the update is zero. Of stacked layers and groups the largest. Layers that are masked out
        of one of the three trees are left out.

    Raises:
        ValueError: a layer's parameter is missing in one of the trees, or has another shape.

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
    scalars = {}
    for path in layers:
        if path in weights and path in gradients and path in steps:
            scalars[f"{path}/update_ratio"] = jnp.max(_ratio(steps[path], weights[path]))
            scalars[f"{path}/angle"] = _largest_angle(steps[path], -gradients[path])
    return scalars


def _matrices(argument: str, tree: Any, layers: Layers) -> dict[str, jax.Array]:
    """The matrix of each layer, in at least float32."""
    try:
        found = to_matrices(tree, layers)
    except ValueError as error:
        raise ValueError(f"{argument!r} is read as a gradient is read: {error}") from error
    return {path: x.astype(at_least_float32(x.dtype)) for path, x in found.items()}


def _direction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x / ‖x‖, ‖x‖) of each matrix; squares of very large or small entries would not fit."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    scaled = x / jnp.where(largest == 0, 1, largest)
    norm = jnp.linalg.norm(scaled, axis=(-2, -1), keepdims=True)
    return scaled / jnp.where(norm == 0, 1, norm), (largest * norm)[..., 0, 0]


def _ratio(step: jax.Array, weight: jax.Array) -> jax.Array:
    """‖step‖ / ‖weight‖ of each matrix."""
    (_, length), (_, size) = _direction(step), _direction(weight)
    return jnp.where(length == 0, 0, length / size)


def _largest_angle(x: jax.Array, y: jax.Array) -> jax.Array:
    """Degrees between two matrices, the largest of all pairs that have an angle; else NaN."""
    (x, x_norm), (y, y_norm) = _direction(x), _direction(y)
    # Not the arc cosine: near 0 and 180 degrees it loses half of the digits.
    apart = jnp.linalg.norm(x - y, axis=(-2, -1))
    along = jnp.linalg.norm(x + y, axis=(-2, -1))
    angles = jnp.degrees(2 * jnp.arctan2(apart, along))
    is_defined = (x_norm != 0) & (y_norm != 0)
    largest = jnp.max(jnp.where(is_defined, angles, -1))
    return jnp.where(largest < 0, jnp.nan, largest)
