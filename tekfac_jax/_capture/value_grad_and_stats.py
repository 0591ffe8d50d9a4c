"""Value, gradient and curvature statistics of a loss, from one forward and backward pass.

The loss is traced once, abstractly, to learn which layer calls can be captured exactly
(`_tracing.trace`). The traced program is then run and differentiated, with a tag on the output of
each of these calls (`_tracing.replay`).
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from tekfac_jax._arguments import check_choice, check_flag, check_function, check_number
from tekfac_jax._capture.modes import MakeCollector, Mode, statistics_function
from tekfac_jax._capture.plan import batch_plan
from tekfac_jax._layers.paths import flattened, join_path
from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._layers.statistics import FactorKind, StatisticsOfBatch
from tekfac_jax._layers.types import Params, PyTree

Divisor = Literal["mean", "sum"] | float | jax.Array


def value_grad_and_stats(
    loss_fn: Callable[..., PyTree],
    layers: Layers,
    *,
    has_aux: bool = False,
    reduction: Divisor = "mean",
    loss_scale: float | jax.Array = 1.0,
    examples: float | jax.Array | None = None,
    mode: Mode = "raw",
    factors: FactorKind = "exact",
) -> Callable[..., tuple[PyTree, Params, PyTree]]:
    """`jax.value_and_grad` over argument 0 that also returns curvature statistics.

    The statistics come from the same forward and backward pass and are those of the empirical
    Fisher (labels from the batch). Value and gradient are those of `jax.value_and_grad`, to the
    last bit if `stats` is not used. If a compiled step returns the statistics, XLA may fuse
    differently, and then sums round differently.

    Args:
        loss_fn: scalar loss of (params, *args, **kwargs). The leading axis of every layer input
            is the batch.
        layers: from `find_layers`.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        reduction: what `loss_fn` divided the sum of its examples' losses by: ``"mean"`` (the number
            of examples it saw), ``"sum"`` (nothing), or a number or scalar array (the number of
            tokens that count, say).
        loss_scale: factor by which `loss_fn` multiplies its loss against underflow in half
            precision: a number, or a traced scalar if it is dynamic. Value and gradient come back
            scaled, as from `jax.value_and_grad`; the statistics are those of the unscaled loss.
        examples: how many examples count, if others only fill up the batch and their loss is
            multiplied by 0: a number, traced or not, for the batch that `loss_fn` sees (under pmap
            and shard_map, the batch of one device). None: all examples count. Not for KFAC and
            EKFAC, whose factor A does not depend on the loss: they count a failure and keep their
            curvature.
        mode: ``"raw"``: the statistics are (a, u) of every layer, and Θ is measured in the fresh
            basis. ``"reduced"``: they are contracted in the backward pass, so they are no larger
            than the curvature (for `nn.remat`, `nn.scan`, long sequences), and those of
            micro-batches add up: ``jax.tree.map(jnp.add, stats, more_stats)``. Θ is then measured
            in the basis that was in force when the step began, so there is none before the second
            step.
        factors: with ``mode="reduced"``, which factors: ``"exact"`` or ``"location"``, the same as
            for the transformation, or ``"plain"`` for KFAC and EKFAC.

    Returns:
        Function of (params, *args, **kwargs) that returns ``(value, grads, stats)``, or
        ``((value, aux), grads, stats)``; `stats` is for `update(grads, ..., stats=stats)`. With
        ``mode="reduced"`` it takes two more keyword arguments. ``opt_state=``, any optax state with
        ours inside, supplies the basis of Θ; without it Θ is not measured, which is enough for
        KFAC and TKFAC. ``when=`` is a boolean, traced or not: if it is False, nothing is
        contracted, and an update with these statistics leaves the curvature as it is. Pass
        ``when=stats_due(opt_state)``.

    Raises:
        ValueError: unknown `reduction`, `mode` or `factors`; `loss_scale` is not positive; when
            called: the loss is not a scalar; a layer of `layers` is missing, is used differently or
            has another shape; there is a layer or a parameter that `find_layers` did not see; batch
            sizes disagree; or the state does not fit the layers.

    Note:
        With train-mode BatchNorm the captured per-example gradients still sum to the batch
        gradient, but none of them is the gradient of that example's loss: the examples share
        their batch statistics.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
        >>> layers = tekfac.find_layers(loss_fn, params, x)
        >>> loss, grads, stats = tekfac.value_grad_and_stats(loss_fn, layers)(params, x)
        >>> stats.layers["~"][0].u.shape
        (8, 3)
    """
    check_layers(layers)
    check_function("loss_fn", loss_fn)
    check_flag("has_aux", has_aux)
    _check_reduction(reduction)
    if examples is not None:
        _check_examples(examples, mode, factors)
    check_number("loss_scale", loss_scale, 0, math.inf, "1.0 means no scaling", open_low=True)

    def run(
        make_collector: MakeCollector,
        params: Params,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[PyTree, Params, StatisticsOfBatch]:
        plan = batch_plan(loss_fn, layers, params, args, kwargs)
        _check_scalar(plan.trace.output, has_aux)
        _check_differentiable(params)

        # u is the gradient of the loss as `loss_fn` divided and scaled it: `scale` undoes both.
        dtype = jnp.result_type(float)
        divisor = _divisor(reduction, plan.batch_size)
        scale = jnp.asarray(divisor, dtype) / jnp.asarray(loss_scale, dtype)
        count = jnp.asarray(_counted(examples, plan.batch_size), dtype)

        # The gradient with respect to the slots is what the tags return.
        collector = make_collector(plan, scale, count)
        grad_fn = jax.value_and_grad(collector.run, argnums=(0, 1), has_aux=has_aux)
        value, (grads, found) = grad_fn(params, collector.slots())
        return value, grads, collector.finish(found)

    return statistics_function(run, layers, mode, factors)


def _divisor(reduction: Divisor, batch_size: int) -> float | jax.Array:
    """What the sum of the examples' losses was divided by."""
    if isinstance(reduction, str):
        return batch_size if reduction == "mean" else 1
    return reduction


def _counted(examples: float | jax.Array | None, batch_size: int) -> float | jax.Array:
    """How many examples count; NaN if a traced number exceeds the batch."""
    if examples is None:
        return batch_size
    if isinstance(examples, int | float):
        if examples > batch_size:
            raise ValueError(
                f"examples={examples} exceeds the batch of {batch_size}: pass how many of this "
                "device's own examples count"
            )
        return examples
    return jnp.where(examples > batch_size, jnp.nan, examples)


def _check_examples(examples: float | jax.Array, mode: Mode, factors: FactorKind) -> None:
    if mode == "reduced" and factors == "plain":
        raise ValueError(
            'examples= cannot be combined with factors="plain": the factor A of KFAC and EKFAC '
            "does not depend on the loss, so fillers would count; leave them out of the batch"
        )
    check_number("examples", examples, 0, math.inf, "None counts all of them")


def _check_reduction(reduction: object) -> None:
    if isinstance(reduction, str):
        check_choice(
            "reduction", reduction, ("mean", "sum"), "or the number that the loss was divided by"
        )
    else:
        remedy = '"mean" and "sum" are the usual choices'
        check_number("reduction", reduction, 0, math.inf, remedy, open_low=True)


def _check_differentiable(params: Params) -> None:
    for path, leaf in flattened(params, "argument 0")[0]:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                "the loss is differentiated with respect to argument 0, whose leaf "
                f"{join_path(path)!r} has dtype {jnp.result_type(leaf)}; keep arrays that are not "
                "floating-point (counters, masks) in another argument"
            )


def _check_scalar(output: PyTree, has_aux: bool) -> None:
    if has_aux:
        if not isinstance(output, tuple) or len(output) != 2:
            raise ValueError("with has_aux=True the loss must return a pair (loss, aux)")
        output = output[0]
    is_array = hasattr(output, "dtype") and type(output) is not jax.ShapeDtypeStruct
    shape = getattr(output, "shape", None) if is_array else None
    if shape != () or not jnp.issubdtype(output.dtype, jnp.floating):
        what = (
            f"shape {shape} and dtype {output.dtype}"
            if shape is not None
            else type(output).__name__
        )
        raise ValueError(
            f"the loss must be a real scalar, got {what}. Take the mean over the examples; "
            "to return more, return (loss, aux) and pass has_aux=True."
        )
