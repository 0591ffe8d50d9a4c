"""The ready-made optimizers: precondition, clip, momentum, decay, and a fallback for the rest."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax  # pyright: ignore[reportMissingTypeStubs]

from tekfac_jax._arguments import check_number, check_transformation
from tekfac_jax._layers.matrices import captured_mask, to_matrices
from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._layers.types import Params
from tekfac_jax._optimizer.clip_by_kl import check_learning_rate, clip_by_kl
from tekfac_jax._optimizer.damping import follows_trace
from tekfac_jax._optimizer.options import Number, check_names
from tekfac_jax._optimizer.signatures import also_arguments_of, defaults_of, same_arguments_as
from tekfac_jax._optimizer.transforms import (
    scale_by_ekfac,
    scale_by_kfac,
    scale_by_tekfac,
    scale_by_tkfac,
)

# Their `damping_scale` under trace damping (Eq. 3.5); docs/results.md has the measurements.
_SCALE_OF_TRACE = 0.3


@also_arguments_of(scale_by_tekfac)
def tekfac(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    momentum: Number | None = 0.9,
    weight_decay: Number = 0.0,
    kl_clip: Number | None = 1e-3,
    fallback: optax.GradientTransformation | None = None,
    damping_scale: Number | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The TEKFAC optimizer, ready to use. `tkfac`, `ekfac` and `kfac` are its siblings.

    Captured parameters are preconditioned (`scale_by_tekfac`) and clipped (`clip_by_kl`), followed
    by heavy-ball momentum, decoupled weight decay and −η. All others go to `fallback`.

    Args:
        learning_rate: η, a number or an optax schedule.
        layers: from `find_layers`.
        momentum: decay of the momentum, in [0, 1). 0 or None: no momentum.
        weight_decay: factor of the captured parameters, added after momentum (decoupled).
        kl_clip: κ of `clip_by_kl`. None: no clipping.
        fallback: transformation for every parameter that is not captured; it applies its own
            learning rate. None: Adam with the same learning rate or schedule.
        damping_scale: multiplies each λ, positive. None: 0.3 under trace damping (with 1, Eq. 3.5
            as printed, training was slower in `docs/results.md`), 1 if λ is fixed.
        **options: further arguments of `scale_by_tekfac`.

    Returns:
        `optax.GradientTransformationExtraArgs`; `update` takes ``stats=``.

    Raises:
        ValueError: an argument is out of its range.

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
def tkfac(
    learning_rate: optax.ScalarOrSchedule, layers: Layers, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The TKFAC optimizer, ready to use: `tekfac` around `scale_by_tkfac`."""
    return _ready(scale_by_tkfac, learning_rate, layers, **(defaults_of(tekfac) | options))


@same_arguments_as(tekfac)
def ekfac(
    learning_rate: optax.ScalarOrSchedule, layers: Layers, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The EKFAC optimizer, ready to use: `tekfac` around `scale_by_ekfac`."""
    return _ready(scale_by_ekfac, learning_rate, layers, **(defaults_of(tekfac) | options))


@same_arguments_as(tekfac)
def kfac(
    learning_rate: optax.ScalarOrSchedule, layers: Layers, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The KFAC optimizer, ready to use: `tekfac` around `scale_by_kfac`."""
    return _ready(scale_by_kfac, learning_rate, layers, **(defaults_of(tekfac) | options))


def _check_gradient(updates: Params, layers: Layers) -> None:
    """Raises for a gradient that does not fit, before optax fails with an obscure error."""
    found = to_matrices(updates, layers)

    def is_masked(node: object) -> bool:
        return isinstance(node, optax.MaskedNode)

    masks = any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked)))
    if not masks and (missing := [path for path in layers if path not in found]):
        raise ValueError(
            f"the gradient is None for the layers {missing}: pass the gradient of all parameters"
        )


def _ready(
    scale_by: Callable[..., optax.GradientTransformationExtraArgs],
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    momentum: Number | None,
    weight_decay: Number,
    kl_clip: Number | None,
    fallback: optax.GradientTransformation | None,
    damping_scale: Number | None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    # Check the arguments here: optax would not name them.
    check_names(options, ("learning_rate", "momentum", "weight_decay", "kl_clip", "fallback"))
    if isinstance(learning_rate, Layers):
        raise ValueError("learning_rate must be a number or a schedule, got Layers: pass it first")
    check_learning_rate(learning_rate)
    check_layers(layers)
    if momentum is not None:
        check_number("momentum", momentum, 0, 1, "0.9 is usual")
    check_number("weight_decay", weight_decay, 0, math.inf, "0 turns it off")

    # Captured parameters. The clip comes before momentum: it bounds what this gradient contributes.
    if damping_scale is None:
        rule = options.get("damping", "auto")
        damping_scale = _SCALE_OF_TRACE if follows_trace(layers, rule) else 1.0
    direction = scale_by(layers, damping_scale=damping_scale, **options)
    if kl_clip is not None:
        check_number("kl_clip", kl_clip, 0, math.inf, "None turns the clip off", open_low=True)
        direction = clip_by_kl(direction, learning_rate, kl_clip)
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    captured = optax.chain(
        direction,
        optax.identity() if momentum is None else optax.trace(momentum),
        # Decay needs params= at update. Leaving it out spares users from passing them.
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )

    # All other parameters.
    if fallback is None:
        fallback = optax.adam(learning_rate)
    check_transformation("fallback", fallback)

    def label(is_captured: bool) -> str:
        return "captured" if is_captured else "fallback"

    def labels(params: Params) -> Params:
        return jax.tree.map(label, captured_mask(params, layers))

    parts = optax.partition({"captured": captured, "fallback": fallback}, labels)

    def update(
        updates: Params, state: optax.OptState, params: Params = None, **extra_args: object
    ) -> tuple[Params, optax.OptState]:
        _check_gradient(updates, layers)
        if not isinstance(state, optax.transforms.PartitionState):
            raise ValueError(
                "state= must be what init or the previous update returned, got "
                f"{type(state).__name__}"
            )
        return parts.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(parts.init, update)
