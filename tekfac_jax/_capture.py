"""Flax in, statistics out.

The loss is traced once, abstractly, to learn which calls are exact (`_trace`). The program that
this gives is then run for differentiation, with a tag on the output of each of these calls
(`_replay`).
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from tekfac_jax._checks import check_choice, check_flag, check_function, check_number
from tekfac_jax._contract import FactorKind
from tekfac_jax._gather import Gatherer, Mode, gathering_function
from tekfac_jax._judge import Skip, as_predicate, check_skip, judge, nothing_found
from tekfac_jax._layers import Layers, check_layers, join_path
from tekfac_jax._plan import Captures, batch_plan, common_batch_size
from tekfac_jax._pytrees import flattened
from tekfac_jax._trace import trace_layers

Divisor = Literal["mean", "sum"] | float | jax.Array
Norm = Literal["fallback", "unitwise"]


def find_layers(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    skip: Skip = None,
    norm: Norm = "fallback",
    **kwargs: Any,
) -> Layers:
    """Finds the layers of a Flax linen network whose curvature can be captured exactly.

    One abstract trace, no arithmetic. Print the result: it lists what is covered and, for each
    parameter that is not, the reason.

    Args:
        fn: the loss, or any function of the parameters that applies the network.
        params: argument 0 of `fn`, a pytree of arrays (or of `jax.ShapeDtypeStruct`).
        *args: the other arguments. Those without a shape (``train=True``) stay static.
        skip: regular expression searched in the layer's path, or predicate on it; layers that
            match are left out.
        norm: ``"unitwise"``: the scale and bias of each feature of a normalisation (`nn.LayerNorm`,
            `nn.RMSNorm`, `nn.GroupNorm`, `nn.InstanceNorm`, `nn.BatchNorm`) get the exact Fisher
            block of these two; ``"fallback"``: they are not covered.
        **kwargs: keyword arguments of `fn`.

    Returns:
        `Layers`, a frozen and hashable mapping from path to `LayerSpec`.

    Raises:
        ValueError: no layer can be captured, the layers disagree on the batch size, `norm` is
            unknown, or `skip` is no regular expression or matches no layer.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
        >>> print(tekfac.find_layers(loss_fn, params, x))
        layer  kind   in  out  positions  state bytes
        ~      dense  6   3    1          432
        1 layers, 432 bytes of state, seen with 8 examples
    """
    check_choice("norm", norm, get_args(Norm))
    _check_keywords(fn, kwargs)
    trace = trace_layers(fn, params, args, kwargs, norms=norm == "unitwise")
    findings = judge(trace, as_predicate(skip))
    if not findings.covered:
        raise ValueError(nothing_found(trace, findings))
    check_skip(skip, findings)
    uncovered = tuple(sorted(findings.uncovered.items()))
    return Layers(tuple(findings.specs.values()), uncovered, common_batch_size(findings.covered))


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


def tap(loss_fn: Callable[..., Any], layers: Layers) -> Callable[..., Any]:
    """The loss with slots: differentiate it with respect to argument 1 to get the captures.

    The layer under `value_grad_and_stats`, for who wants to own `jax.grad`. Wrap the captures as
    ``Statistics(captures, scale)``, where `scale` is what the loss was divided by.

    Args:
        loss_fn: function of (params, *args, **kwargs).
        layers: from `find_layers`.

    Returns:
        Function of (params, slots, *args, **kwargs) that returns what `loss_fn` returns.

    Raises:
        ValueError: when called: a layer of `layers` is missing, used differently or has another
            shape, there is one or a parameter that `find_layers` did not see, or batch sizes
            disagree.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.sum(model.apply({"params": params}, x) ** 2)
        >>> layers = tekfac.find_layers(loss_fn, params, x)
        >>> slots = tekfac.make_slots(loss_fn, layers, params, x)
        >>> captures = jax.grad(tekfac.tap(loss_fn, layers), argnums=1)(params, slots, x)
        >>> captures["~"][0].a.shape
        (8, 5)
    """
    check_layers(layers)
    check_function("loss_fn", loss_fn)

    def tapped(params: Any, slots: Captures, *args: Any, **kwargs: Any) -> Any:
        plan = batch_plan(loss_fn, layers, params, args, kwargs)
        _check_slots(slots, plan.slots())
        return plan.run(params, slots)

    return tapped


def make_slots(
    loss_fn: Callable[..., Any], layers: Layers, params: Any, *args: Any, **kwargs: Any
) -> Captures:
    """Zero slots for `tap`, of the shapes that these arguments lead to.

    Args:
        loss_fn: function of (params, *args, **kwargs).
        layers: from `find_layers`.
        params: argument 0.
        *args: the other arguments.
        **kwargs: keyword arguments.

    Returns:
        For each layer path one `Capture` per call: `a` in the shape of the layer's input, `u` in
        the shape of its output.

    Raises:
        ValueError: a layer of `layers` is missing, used differently or has another shape, or there
            is one or a parameter that `find_layers` did not see.

    Example: see `tap`.
    """
    check_layers(layers)
    return batch_plan(loss_fn, layers, params, args, kwargs).slots()


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


# --- checks ----------------------------------------------------------------------------------


def _check_keywords(fn: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raises for an option of `value_grad_and_stats` that would be passed on to `fn`."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # no function, or one that does not say
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    options = inspect.signature(value_grad_and_stats).parameters
    for name in kwargs:
        if name in options and name not in parameters:
            raise ValueError(
                f"{name}= is an option of value_grad_and_stats; find_layers takes the function and "
                "what it is called with, whatever it returns, besides skip= and norm="
            )


def _check_reduction(reduction: Any) -> None:
    if isinstance(reduction, str):
        check_choice("reduction", reduction, ("mean", "sum"), "or what the loss was divided by")
    else:
        remedy = '"mean" and "sum" say it in words'
        check_number("reduction", reduction, 0, math.inf, remedy, open_low=True)


def _check_slots(slots: Any, expected: Captures) -> None:
    found, structure = flattened(slots, "slots")
    leaves, wanted = flattened(expected, "slots")
    same = structure == wanted and all(
        isinstance(x, jax.Array | np.ndarray) and x.shape == like.shape
        for (_, x), (_, like) in zip(found, leaves, strict=True)
    )
    if not same:
        raise ValueError(
            "slots do not fit: they must be what make_slots returns for this function, these "
            "layers and arguments of these shapes"
        )


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
