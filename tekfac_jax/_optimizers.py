"""The ready optimizers: precondition, clip, momentum, decay, and something for all the rest."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tekfac_jax._checks import check_number, check_transformation
from tekfac_jax._damping import follows_trace, kl_factor
from tekfac_jax._layers import Layers
from tekfac_jax._options import also_arguments_of, check_names, same_arguments_as
from tekfac_jax._pytrees import captured_mask, to_matrices, layer_path
from tekfac_jax._readers import search
from tekfac_jax._state import ClipByKlState, ScaleByTekfacState, is_valid
from tekfac_jax._transform import (
    scale_by_ekfac,
    scale_by_kfac,
    scale_by_tekfac,
    scale_by_tkfac,
)

LearningRate = optax.ScalarOrSchedule

# What is left of Eq. 3.5 where nothing else is said: docs/results.md has the readings.
_SCALE_OF_TRACE = 0.3


def clip_by_kl(
    inner: optax.GradientTransformation, learning_rate: LearningRate, max_kl: Any = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the step of `inner` where it would move the predictive distribution too far.

    Multiplies the updates by min(1, √(κ / (η² Σ ⟨ΔW, G⟩))), with one factor for all layers.
    Where `inner` holds curvature of ours, only layers whose curvature is valid are counted and
    multiplied: elsewhere ⟨ΔW, G⟩ is no divergence. It wraps `inner` because it needs the
    gradient, the preconditioned gradient and η at once; put it before momentum.

    Args:
        inner: transformation that preconditions.
        learning_rate: η, a number or a schedule of the step count.
        max_kl: κ, bound on η² ΔWᵀ F ΔW (twice the predicted KL divergence), positive.

    Returns:
        `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: `max_kl` not positive, or `learning_rate` negative.

    Example:
        >>> import jax.numpy as jnp, optax, tekfac_jax as tekfac
        >>> tx = tekfac.clip_by_kl(optax.scale(100.0), learning_rate=1.0, max_kl=1.0)
        >>> updates, state = tx.update(jnp.ones(4), tx.init(jnp.ones(4)))
        >>> print(updates)
        [5. 5. 5. 5.]
    """
    check_number("max_kl", max_kl, 0, math.inf, "1e-3 is usual", open_low=True)
    _check_learning_rate(learning_rate)
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ClipByKlState:
        dtype = jnp.result_type(float)
        return ClipByKlState(jnp.zeros((), jnp.int32), jnp.ones((), dtype), inner.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipByKlState]:
        directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        counted = _counted(directions, inner_state)
        eta: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        products = jax.tree.map(_inner_product, counted, directions, updates)
        total = sum(jax.tree.leaves(products), start=jnp.zeros((), state.factor.dtype))
        eta, kappa = (jnp.asarray(x).astype(total.dtype) for x in (eta, max_kl))
        factor = kl_factor(total, eta, kappa).astype(state.factor.dtype)
        clipped = jax.tree.map(
            lambda use, d: jnp.where(use, d * factor.astype(d.dtype), d), counted, directions
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        return clipped, ClipByKlState(count, factor, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_learning_rate(value: Any) -> None:
    if not callable(value):
        check_number("learning_rate", value, 0, math.inf, "or an optax schedule; pass η, not −η")


def _inner_product(use: jax.Array, direction: jax.Array, gradient: jax.Array) -> jax.Array:
    dtype = jnp.result_type(float)
    product = jnp.sum(direction.astype(dtype) * gradient.astype(dtype))
    return jnp.where(use, product, 0)


def _counted(directions: Any, inner_state: Any) -> Any:
    """For each leaf whether it was preconditioned with valid curvature, if only in part.

    In part: a feature of a normalisation that is dead has no curvature, all others have.
    """
    states = search(inner_state, ScaleByTekfacState)
    if not states:
        return jax.tree.map(lambda d: jnp.array(True), directions)
    valid = {
        path: jnp.any(is_valid(layer)) for state in states for path, layer in state.layers.items()
    }
    nothing = jnp.array(False)
    return jax.tree_util.tree_map_with_path(
        lambda path, d: valid.get(layer_path(path) or "", nothing), directions
    )


@also_arguments_of(scale_by_tekfac)
def tekfac(
    learning_rate: LearningRate,
    layers: Layers,
    *,
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
    kl_clip: Any = 1e-3,
    fallback: optax.GradientTransformation | None = None,
    damping_scale: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The TEKFAC optimizer, ready to use. `tkfac`, `ekfac` and `kfac` are its siblings.

    Captured parameters: preconditioned (`scale_by_tekfac`), clipped (`clip_by_kl`), heavy-ball
    momentum, decoupled weight decay, times −η. Everything else goes to `fallback`.

    Args:
        learning_rate: η, a number or an optax schedule.
        layers: from `find_layers`.
        momentum: decay of the momentum, in [0, 1); 0 or None: none.
        weight_decay: multiplies the captured parameters, added after momentum (decoupled).
        kl_clip: κ of `clip_by_kl`; None: no clip.
        fallback: transformation for every parameter that is not captured; it applies its own
            learning rate. None: Adam with the same learning rate or schedule.
        damping_scale: multiplies each λ, positive. None: 0.3 where λ follows the trace (Eq. 3.5
            itself, 1, trained slower in `docs/results.md`), 1 where it is fixed.
        **options: other arguments of `scale_by_tekfac`.

    Returns:
        `optax.GradientTransformationExtraArgs`; `update` takes ``stats=``.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.sum((model.apply({"params": params}, x) - 1) ** 2, axis=-1))
        >>> layers = tekfac.find_layers(loss_fn, params, x)
        >>> tx = tekfac.tekfac(0.1, layers, factor_interval=10)
        >>> state = tekfac.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        >>> loss, grads, stats = tekfac.value_grad_and_stats(loss_fn, layers)(params, x)
        >>> state = state.apply_gradients(grads=grads, stats=stats)
        >>> bool(loss_fn(state.params, x) < loss)
        True
    """
    return _ready(
        scale_by_tekfac,
        learning_rate,
        layers,
        momentum=momentum,
        weight_decay=weight_decay,
        kl_clip=kl_clip,
        fallback=fallback,
        damping_scale=damping_scale,
        **options,
    )


@same_arguments_as(tekfac)
def tkfac(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """The TKFAC optimizer, ready to use: `tekfac` around `scale_by_tkfac`."""
    return _ready(scale_by_tkfac, *args, **kwargs)


@same_arguments_as(tekfac)
def ekfac(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """The EKFAC optimizer, ready to use: `tekfac` around `scale_by_ekfac`."""
    return _ready(scale_by_ekfac, *args, **kwargs)


@same_arguments_as(tekfac)
def kfac(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """The KFAC optimizer, ready to use: `tekfac` around `scale_by_kfac`."""
    return _ready(scale_by_kfac, *args, **kwargs)


def _check_gradient(updates: Any, layers: Layers) -> None:
    """Raises for a gradient that does not fit, over which optax would stumble."""
    found = to_matrices(updates, layers)

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    masks = any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked)))
    if not masks and (missing := [path for path in layers if path not in found]):
        raise ValueError(
            f"the gradient is None for the layers {missing}: pass the gradient of all parameters"
        )


def _ready(
    scale_by: Callable[..., optax.GradientTransformationExtraArgs],
    learning_rate: LearningRate,
    layers: Layers,
    *,
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
    kl_clip: Any = 1e-3,
    fallback: optax.GradientTransformation | None = None,
    damping_scale: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    check_names(options, ("learning_rate", "momentum", "weight_decay", "kl_clip", "fallback"))
    if isinstance(learning_rate, Layers):
        raise ValueError("learning_rate must be a number or a schedule, got Layers: it comes first")
    _check_learning_rate(learning_rate)
    if momentum is not None:
        check_number("momentum", momentum, 0, 1, "0.9 is usual")
    check_number("weight_decay", weight_decay, 0, math.inf, "0 turns it off")
    if damping_scale is None:
        rule = options.get("damping", "auto")
        by_trace = isinstance(layers, Layers) and follows_trace(layers, rule)
        damping_scale = _SCALE_OF_TRACE if by_trace else 1.0
    direction = scale_by(layers, damping_scale=damping_scale, **options)
    if kl_clip is not None:
        check_number("kl_clip", kl_clip, 0, math.inf, "None turns the clip off", open_low=True)
        direction = clip_by_kl(direction, learning_rate, kl_clip)
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    captured = optax.chain(
        direction,
        optax.identity() if momentum is None else optax.trace(momentum),
        # Decay needs the parameters at update; without it nobody has to pass them.
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    if fallback is None:
        fallback = optax.adam(learning_rate)
    check_transformation("fallback", fallback)

    def labels(params: Any) -> Any:
        mask = captured_mask(params, layers)
        return jax.tree.map(lambda is_captured: "captured" if is_captured else "fallback", mask)

    parts = optax.partition({"captured": captured, "fallback": fallback}, labels)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.OptState]:
        _check_gradient(updates, layers)
        if not isinstance(state, optax.transforms.PartitionState):
            raise ValueError(
                "state= must be what init or the update before returned, got "
                f"{type(state).__name__}"
            )
        return parts.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(parts.init, update)
