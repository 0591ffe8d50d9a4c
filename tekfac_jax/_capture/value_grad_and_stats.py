"""Flax in, statistics out.

The loss is traced once, abstractly, to learn which calls are exact (`_trace`). The program that
this gives is then run for differentiation, with a tag on the output of each of these calls
(`_replay`).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tekfac_jax._arguments import check_choice, check_flag, check_function, check_number
from tekfac_jax._capture.modes import Gatherer, Mode, gathering_function
from tekfac_jax._capture.plan import batch_plan
from tekfac_jax._layers.paths import flattened, join_path
from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._layers.statistics import FactorKind

Divisor = Literal["mean", "sum"] | float | jax.Array


def value_grad_and_stats(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    reduction: Divisor = "mean",
    loss_scale: float | jax.Array = 1.0,
    examples: float | jax.Array | None = None,
    mode: Mode = "raw",
    factors: FactorKind = "exact",
) -> Callable[..., Any]:
    """`jax.value_and_grad` over argument 0 that also returns curvature statistics.

    The statistics come out of the same forward and backward pass: they are those of the
    empirical Fisher (labels of the batch). Value and gradient are those of `jax.value_and_grad`,
    to the last bit where `stats` is not used; as outputs of a compiled step the statistics may
    keep XLA from a fusion, and then sums round differently.

    Args:
        loss_fn: scalar loss of (params, *args, **kwargs). The leading axis of every layer input
            is the batch.
        layers: from `find_layers`.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        reduction: what the sum of the examples' losses was divided by: ``"mean"`` (the examples
            that `loss_fn` saw), ``"sum"`` (nothing), or a number or scalar array (the number of
            tokens that count, say).
        loss_scale: what `loss_fn` multiplies its loss by, against underflow in half precision: a
            number, or a traced scalar where it is dynamic. Value and gradient come back scaled, as
            from `jax.value_and_grad`; the statistics are those of the loss itself.
        examples: how many examples count, where some only fill the batch up and their loss is
            multiplied by 0: a number, traced or not, of the batch that `loss_fn` sees (under
            pmap and shard_map that of one device); None: all of them. Not for KFAC and EKFAC,
            whose factor A does not see the loss: they count a failure and keep their curvature.
        mode: ``"raw"``: the statistics are (a, u) of every layer, and Θ is measured in the fresh
            basis. ``"reduced"``: they are contracted in the backward pass, so that they are no
            larger than the curvature (for `nn.remat`, `nn.scan`, long sequences), and those of
            micro-batches add up: ``jax.tree.map(jnp.add, stats, more_stats)``. Θ is then measured
            in the basis in force when the step began, and there is none before the second step.
        factors: with ``mode="reduced"``, which factors: ``"exact"`` or ``"location"``, as the
            transformation has it, or ``"plain"`` for KFAC and EKFAC.

    Returns:
        Function of (params, *args, **kwargs) that returns ``(value, grads, stats)``, or
        ``((value, aux), grads, stats)``; `stats` is for `update(grads, ..., stats=stats)`. With
        ``mode="reduced"`` it also takes ``opt_state=``, any optax state with ours inside, for the
        basis of Θ (without, Θ is not measured: enough for KFAC and TKFAC), and ``when=``, a
        boolean, traced or not: where it is False nothing is contracted, and an update with these
        statistics leaves the curvature as it is; pass ``when=stats_due(opt_state)``.

    Raises:
        ValueError: unknown `reduction`, `mode` or `factors`, `loss_scale` not positive; when
            called: the loss is no scalar, a layer of `layers` is missing, used differently or has
            another shape, there is a layer or a parameter that `find_layers` did not see, batch
            sizes disagree, or the state does not fit the layers.

    Note:
        With train-mode BatchNorm the sum of the statistics' gradients is the batch gradient, but
        an example's own matrix is not the gradient of that example's loss, since the examples
        share their statistics.

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
    if examples is not None and mode == "reduced" and factors == "plain":
        raise ValueError(
            'examples= does not go with factors="plain": the factor A of KFAC and EKFAC does not '
            "see the loss, and so not which examples count; leave out those that do not"
        )
    if examples is not None:
        check_number("examples", examples, 0, math.inf, "None counts all of them")
    check_number("loss_scale", loss_scale, 0, math.inf, "1.0 is no scale", open_low=True)

    def gather(gatherer: Gatherer, params: Any, args: Any, kwargs: Any) -> Any:
        plan = batch_plan(loss_fn, layers, params, args, kwargs)
        _check_scalar(plan.trace.output, has_aux)
        _check_differentiable(params)
        dtype = jnp.result_type(float)
        if isinstance(reduction, str):
            divisor: Any = plan.batch_size if reduction == "mean" else 1
        else:
            divisor = reduction
        scale = jnp.asarray(divisor, dtype) / jnp.asarray(loss_scale, dtype)
        count = jnp.asarray(_counted(examples, plan.batch_size), dtype)
        gathering = gatherer(plan, scale, count)
        grad_fn = jax.value_and_grad(gathering.run, argnums=(0, 1), has_aux=has_aux)
        value, (grads, found) = grad_fn(params, gathering.slots())
        return value, grads, gathering.finish(found)

    return gathering_function(gather, layers, mode, factors)


def _counted(examples: Any, batch_size: int) -> Any:
    """How many examples count; not a number where there are not so many, if that is only traced."""
    if examples is None:
        return batch_size
    if isinstance(examples, int | float):
        if examples > batch_size:
            raise ValueError(
                f"examples={examples} of a batch of {batch_size}: pass how many of this device's "
                "own examples count"
            )
        return examples
    return jnp.where(examples > batch_size, jnp.nan, examples)


def _check_reduction(reduction: Any) -> None:
    if isinstance(reduction, str):
        check_choice("reduction", reduction, ("mean", "sum"), "or what the loss was divided by")
    else:
        remedy = '"mean" and "sum" say it in words'
        check_number("reduction", reduction, 0, math.inf, remedy, open_low=True)


def _check_differentiable(params: Any) -> None:
    for path, leaf in flattened(params, "argument 0")[0]:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"the loss is differentiated by argument 0, whose leaf {join_path(path)!r} has "
                f"dtype {jnp.result_type(leaf)}; keep what is no floating-point array (counters, "
                "masks) in another argument"
            )


def _check_scalar(output: Any, has_aux: bool) -> None:
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
            "with further outputs return (loss, aux) and pass has_aux=True."
        )
