"""Bounds how far one step may move the model's predictive distribution."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import math

import jax
import jax.numpy as jnp
import optax  # pyright: ignore[reportMissingTypeStubs]

from tekfac_jax._arguments import check_number, check_transformation
from tekfac_jax._layers.paths import layer_path
from tekfac_jax._layers.types import KeyPath, OptState, Params
from tekfac_jax._optimizer.options import Number
from tekfac_jax._state.layout import ClipByKlState, ScaleByTekfacState, is_valid
from tekfac_jax._state.recognise import search


def clip_by_kl(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    max_kl: Number = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the step of `inner` if it would move the predictive distribution too far.

    Multiplies the updates by min(1, √(κ / (η² Σ ⟨ΔW, G⟩))), with one factor for all layers.
    If `inner` contains a transformation of this library, only layers with valid curvature are
    counted and multiplied; without curvature, ⟨ΔW, G⟩ measures no divergence. The clip wraps
    `inner` because it needs the gradient, the preconditioned gradient and η together. Put it
    before momentum.

    Args:
        inner: the transformation that preconditions.
        learning_rate: η, a number or a schedule of the step count.
        max_kl: κ, bound on η² ΔWᵀ F ΔW (twice the predicted KL divergence), positive.

    Returns:
        `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: `max_kl` is not positive, or `learning_rate` is negative.

    Example:
        >>> import jax.numpy as jnp, optax, tekfac_jax as tekfac
        >>> tx = tekfac.clip_by_kl(optax.scale(100.0), learning_rate=1.0, max_kl=1.0)
        >>> updates, state = tx.update(jnp.ones(4), tx.init(jnp.ones(4)))
        >>> print(updates)
        [5. 5. 5. 5.]
    """
    check_number("max_kl", max_kl, 0, math.inf, "1e-3 is usual", open_low=True)
    check_learning_rate(learning_rate)
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> ClipByKlState:
        dtype = jnp.result_type(float)
        return ClipByKlState(jnp.zeros((), jnp.int32), jnp.ones((), dtype), inner.init(params))

    def update(
        updates: Params, state: OptState, params: Params = None, **extra_args: object
    ) -> tuple[Params, ClipByKlState]:
        # The predicted divergence of the whole step, from the layers with valid curvature.
        directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        counted = _counted(directions, inner_state)
        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        products = jax.tree.map(_inner_product, counted, directions, updates)
        total = sum(jax.tree.leaves(products), start=jnp.zeros((), state.factor.dtype))

        # One factor for all layers keeps the direction of the step.
        eta, kappa = (jnp.asarray(x).astype(total.dtype) for x in (eta, max_kl))
        factor = kl_factor(total, eta, kappa).astype(state.factor.dtype)

        def clip(use: jax.Array, direction: jax.Array) -> jax.Array:
            return jnp.where(use, direction * factor.astype(direction.dtype), direction)

        clipped = jax.tree.map(clip, counted, directions)
        count = jnp.asarray(optax.safe_increment(state.count))
        return clipped, ClipByKlState(count, factor, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check_learning_rate(value: object) -> None:
    """Raises unless it is a schedule or a number that is not negative."""
    if not callable(value):
        check_number("learning_rate", value, 0, math.inf, "or an optax schedule; pass η, not −η")


def _inner_product(use: jax.Array, direction: jax.Array, gradient: jax.Array) -> jax.Array:
    dtype = jnp.result_type(float)
    product = jnp.sum(direction.astype(dtype) * gradient.astype(dtype))
    return jnp.where(use, product, 0)


def _counted(directions: Params, inner_state: OptState) -> Params:
    """For each leaf, whether at least part of it was preconditioned with valid curvature.

    A normalisation layer can be valid in part: only its dead features have no curvature.
    """
    states = search(inner_state, ScaleByTekfacState)
    valid = {
        path: jnp.any(is_valid(layer)) for state in states for path, layer in state.layers.items()
    }

    def is_counted(path: KeyPath, direction: jax.Array) -> jax.Array:
        del direction
        return valid.get(layer_path(path) or "", jnp.array(not states))

    return jax.tree_util.tree_map_with_path(is_counted, directions)


def kl_factor(
    inner_product: jax.Array, learning_rate: jax.Array | float, max_kl: jax.Array | float
) -> jax.Array:
    """min(1, √(κ / (η² ⟨ΔW, G⟩))): shrinks a step whose predicted KL divergence exceeds κ/2."""
    divergence = learning_rate**2 * inner_product
    too_far = divergence > max_kl  # False for NaN and for 0
    return jnp.where(too_far, jnp.sqrt(max_kl / jnp.where(too_far, divergence, 1)), 1)
