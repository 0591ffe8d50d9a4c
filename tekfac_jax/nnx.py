"""Capture for modules of `flax.nnx`: the same calls, the same statistics, the same optimizers.

A module's parameters (`nnx.Param`) are argument 0, as a pytree of arrays; the loss is a function
of the module, which is put together again inside the trace. Everything behind that is shared with
`flax.linen`.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax

import tekfac_jax as tekfac
from tekfac_jax._capture import Divisor, Norm
from tekfac_jax._contract import FactorKind
from tekfac_jax._fisher import Estimator, Likelihood
from tekfac_jax._flax_layers import (
    captured_input,
    describe,
    input_of,
    is_norm,
    is_supported,
    kernel_of,
    normalised,
    why_not_supported,
)
from tekfac_jax._gather import Mode
from tekfac_jax._judge import Skip
from tekfac_jax._layers import Layers
from tekfac_jax._record import current_recorder

__all__ = ["check_capture", "find_layers", "fisher_stats", "value_grad_and_stats"]

# The layers that nnx shares with linen: the same attributes, and the same parameters.
_LINEN: dict[type, type] = {
    nnx.Linear: nn.Dense,
    nnx.LinearGeneral: nn.DenseGeneral,
    nnx.Einsum: nn.Einsum,
    nnx.Conv: nn.Conv,
    nnx.ConvTranspose: nn.ConvTranspose,
    nnx.Embed: nn.Embed,
    nnx.LayerNorm: nn.LayerNorm,
    nnx.RMSNorm: nn.RMSNorm,
    nnx.GroupNorm: nn.GroupNorm,
    nnx.BatchNorm: nn.BatchNorm,
}


def find_layers(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    skip: Skip = None,
    norm: Norm = "fallback",
    **kwargs: Any,
) -> Layers:
    """Finds the layers of an nnx module whose curvature can be captured exactly.

    Args:
        loss_fn: the loss, or any function that applies the module: of (model, *args, **kwargs).
        model: the module; it is left as it is.
        *args: the other arguments, arrays or static.
        skip: regular expression searched in the layer's path, or predicate on it; layers that
            match are left out.
        norm: as in `tekfac_jax.find_layers`.
        **kwargs: keyword arguments of `loss_fn`.

    Returns:
        `Layers`; paths are those of the module's attributes, joined with ``/``.

    Raises:
        ValueError: no layer can be captured, or the layers disagree on the batch size.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import tekfac_jax.nnx
        >>> model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        >>> def loss_fn(model, x):
        ...     return jnp.mean(model(x) ** 2)
        >>> print(tekfac_jax.nnx.find_layers(loss_fn, model, jnp.ones((8, 5))))
        layer  kind   in  out  positions  state bytes
        ~      dense  6   3    1          432
        1 layers, 432 bytes of state, seen with 8 examples
    """
    graph, params, rest = _split(model)
    fn = _of_parameters(loss_fn, graph, params)
    return tekfac.find_layers(
        fn, nnx.as_pure(params), rest, *args, skip=skip, norm=norm, **kwargs
    )


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
    """`nnx.value_and_grad` that also returns curvature statistics.

    Args:
        loss_fn: scalar loss of (model, *args, **kwargs). The leading axis of every layer input is
            the batch.
        layers: from `find_layers` of this module.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        reduction: as in `tekfac_jax.value_grad_and_stats`.
        loss_scale: as in `tekfac_jax.value_grad_and_stats`, like all that follow.
        examples: how many examples count.
        mode: ``"raw"`` or ``"reduced"``; then pass ``opt_state=optimizer.opt_state``.
        factors: which factors, with ``mode="reduced"``.

    Returns:
        Function of (model, *args, **kwargs) that returns ``(value, grads, stats)``, or
        ``((value, aux), grads, stats)``. `grads` is what `nnx.grad` returns; give it to
        ``optimizer.update(model, grads, stats=stats)``. Everything in the model that is no
        parameter (BatchNorm's averages, random streams) moves on, as in `nnx.value_and_grad`.

    Raises:
        ValueError: as `tekfac_jax.value_grad_and_stats`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import tekfac_jax as tekfac, tekfac_jax.nnx
        >>> model, x = nnx.Linear(5, 3, rngs=nnx.Rngs(0)), jnp.ones((8, 5))
        >>> def loss_fn(model, x):
        ...     return jnp.mean(model(x) ** 2)
        >>> layers = tekfac.nnx.find_layers(loss_fn, model, x)
        >>> optimizer = nnx.Optimizer(model, tekfac.tekfac(0.1, layers), wrt=nnx.Param)
        >>> loss, grads, stats = tekfac.nnx.value_grad_and_stats(loss_fn, layers)(model, x)
        >>> _ = optimizer.update(model, grads, stats=stats)
        >>> bool(loss_fn(model, x) < loss)
        True
    """

    def gather(fn: Any, params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        capture = tekfac.value_grad_and_stats(
            fn, layers, has_aux=True, reduction=reduction, loss_scale=loss_scale,
            examples=examples, mode=mode, factors=factors,
        )  # fmt: skip
        (loss, (aux, rest)), grads, stats = capture(nnx.as_pure(params), rest, *args, **kwargs)
        return rest, ((loss, aux) if has_aux else loss, _like(params, grads), stats)

    return _of_model(gather, loss_fn, has_aux)


def check_capture(
    loss_fn: Callable[..., Any],
    layers: Layers,
    model: nnx.Module,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> dict[str, float]:
    """Compares the sum of the captured per-example gradients with the gradient, layer by layer.

    Args:
        loss_fn: as for `value_grad_and_stats`.
        layers: from `find_layers` of this module.
        model: argument 0 of `loss_fn`; it is left as it is.
        *args: its other arguments.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        **kwargs: keyword arguments of `loss_fn`.

    Returns:
        As `tekfac_jax.check_capture`: layer path -> relative error, about 1e-6 in float32.

    Raises:
        ValueError: as `value_grad_and_stats`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import tekfac_jax.nnx
        >>> model, x = nnx.Linear(5, 3, rngs=nnx.Rngs(0)), jnp.ones((8, 5))
        >>> def loss_fn(model, x):
        ...     return jnp.mean(model(x) ** 2)
        >>> layers = tekfac_jax.nnx.find_layers(loss_fn, model, x)
        >>> tekfac_jax.nnx.check_capture(loss_fn, layers, model, x)["~"] < 1e-5
        True
    """
    graph, params, rest = _split(model)
    fn = _of_parameters(loss_fn, graph, params, has_aux=has_aux)
    return tekfac.check_capture(
        fn, layers, nnx.as_pure(params), rest, *args, has_aux=True, **kwargs
    )


def fisher_stats(
    predict_fn: Callable[..., Any],
    layers: Layers,
    *,
    likelihood: Likelihood,
    estimator: Estimator = "sampled",
    has_aux: bool = False,
    mode: Mode = "raw",
    factors: FactorKind = "exact",
) -> Callable[..., Any]:
    """Curvature statistics from labels that the module itself predicts.

    Args:
        predict_fn: function of (model, *args, **kwargs) that returns the outputs, such as logits.
        layers: from `find_layers` of this module.
        likelihood: as in `tekfac_jax.fisher_stats`, like all that follow.
        estimator: ``"sampled"`` or ``"exact"``.
        has_aux: whether `predict_fn` returns ``(outputs, aux)``.
        mode: ``"raw"`` or ``"reduced"``.
        factors: which factors, with ``mode="reduced"``.

    Returns:
        Function of (model, *args, key=None, **kwargs) that returns `stats`, or ``(aux, stats)``.

    Raises:
        ValueError: as `tekfac_jax.fisher_stats`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import tekfac_jax as tekfac, tekfac_jax.nnx
        >>> model, x = nnx.Linear(5, 3, rngs=nnx.Rngs(0)), jnp.ones((8, 5))
        >>> def predict_fn(model, x):
        ...     return model(x)
        >>> layers = tekfac.nnx.find_layers(predict_fn, model, x)
        >>> stats_fn = tekfac.nnx.fisher_stats(predict_fn, layers, likelihood=tekfac.Categorical())
        >>> stats_fn(model, x, key=jax.random.key(1)).layers["~"][0].u.shape
        (8, 3)
    """

    def gather(fn: Any, params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        capture = tekfac.fisher_stats(
            fn, layers, likelihood=likelihood, estimator=estimator, has_aux=True, mode=mode,
            factors=factors,
        )  # fmt: skip
        (aux, rest), stats = capture(nnx.as_pure(params), rest, *args, **kwargs)
        return rest, (aux, stats) if has_aux else stats

    return _of_model(gather, predict_fn, has_aux)


def _of_model(
    gather: Callable[..., Any], fn: Callable[..., Any], has_aux: bool
) -> Callable[..., Any]:
    """`gather` as a function of the model, whose other state it moves on."""

    def wrapped(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        graph, params, rest = _split(model)
        if "opt_state" in kwargs:
            kwargs["opt_state"] = nnx.as_pure(kwargs["opt_state"])
        of_parameters = _of_parameters(fn, graph, params, has_aux=has_aux)
        rest, result = gather(of_parameters, params, rest, args, kwargs)
        nnx.update(model, rest)
        return result

    return wrapped


def _split(model: Any) -> Any:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    if isinstance(model, nnx.State) or not jax.tree.leaves(params):
        raise ValueError(
            f"argument 0 must be an nnx.Module with an nnx.Param, got {type(model).__name__}; "
            "parameters of linen go to the function of the same name in tekfac_jax"
        )
    return graph, params, rest


def _like(state: Any, values: Any) -> Any:
    """The state with other values, which are a pytree of arrays in its order."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(values))


def _of_parameters(
    loss_fn: Callable[..., Any], graph: Any, params: Any, *, has_aux: bool = False
) -> Callable[..., Any]:
    """The loss as a function of (parameters, all other state, *args) that returns that state."""

    def fn(values: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graph, _like(params, values), rest)
        for _, module in nnx.iter_modules(model):
            if callable(module):
                # The class alone decides what a call does, and survives nnx's own transforms.
                object.__setattr__(module, "__class__", _telling(type(module)))
        result = loss_fn(model, *args, **kwargs)
        loss, aux = result if has_aux else (result, None)
        return loss, (aux, nnx.state(model, nnx.Not(nnx.Param)))

    return fn


@functools.cache
def _telling(kind: type) -> type:
    """A subclass whose calls tell the recorder of the trace, where there is one."""

    def telling(method: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _tell(kind, method, self, args, kwargs)

        return call

    methods = [name for name in ("__call__", "attend") if hasattr(kind, name)]
    body = {name: telling(name) for name in methods}
    return type(kind.__name__, (kind,), {**body, "__module__": kind.__module__})


def _tell(
    kind: type, method: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Makes the call, and tells of it."""
    recorder = current_recorder()
    original = functools.partial(getattr(kind, method), module, *args, **kwargs)
    if recorder is None:
        return original()
    variables = {n: v for n, v in vars(module).items() if isinstance(v, nnx.Variable)}
    parameters = {n: v[...] for n, v in variables.items() if isinstance(v, nnx.Param)}
    with recorder.module((args, kwargs, parameters)):
        linen = _LINEN.get(kind, kind)
        kernel = kernel_of(linen, parameters)
        if kernel is None or not is_supported(linen, method, norms=recorder.norms):
            result = original()
            recorder.other(parameters, why_not_supported(linen, norms=recorder.norms))
            return result
        x = input_of(args, kwargs)
        if not hasattr(x, "shape"):
            return original()
        like = _as_linen(module)
        captured = captured_input(linen, method, like, x, parameters)
        if is_norm(linen):
            stats = {n: v[...] for n, v in variables.items() if isinstance(v, nnx.BatchStat)}
            state = {"batch_stats": stats} if stats else {}
            x = normalised(linen, like, args, kwargs, state, captured.dtype)
        return recorder.layer(
            original,
            x,
            parameters,
            kernel,
            lambda y: describe(linen, method, like, x, y, kernel),
            captured,
            kind.__name__,
        )


# What nnx has as a default where linen has None, or another function of the same name.
_DEFAULTS = {
    "dot_general": lax.dot_general,
    "conv_general_dilated": lax.conv_general_dilated,
    "einsum_op": jnp.einsum,
}


def _as_linen(module: Any) -> Any:
    """The attributes that the layer would have in linen."""
    attributes: dict[str, Any] = {
        "dot_general": None, "dot_general_cls": None, "conv_general_dilated_cls": None,
    }  # fmt: skip
    attributes |= {name: value for name, value in vars(module).items() if name[0] != "_"}
    for name, default in _DEFAULTS.items():
        if attributes.get(name) is default:
            attributes[name] = None
    if module.promote_dtype is nnx_dtypes.promote_dtype:
        attributes["promote_dtype"] = linen_dtypes.promote_dtype
    attributes["use_bias"] = getattr(module, "bias", None) is not None
    if "num_groups" in attributes:  # nnx keeps both, linen takes one
        attributes["group_size"] = None
    attributes["batch_dims"] = tuple(attributes.get("batch_axis", ()))
    if attributes.get("einsum_op") is not None:
        attributes["promote_dtype"] = None  # it computes something else
    return SimpleNamespace(**attributes)
