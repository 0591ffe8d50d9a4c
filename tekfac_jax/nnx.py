"""Capture for modules of `flax.nnx`: the same functions, statistics and optimizers.

The loss is a function of the module. Internally its parameters (`nnx.Param`) become argument 0, a
pytree of arrays, and the module is put together again inside the trace. Everything else is shared
with `flax.linen`.
"""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
from flax import nnx

import tekfac_jax as tekfac
from tekfac_jax._capture.coverage import Skip
from tekfac_jax._capture.find_layers import Norm
from tekfac_jax._capture.fisher_stats import Estimator, Likelihood
from tekfac_jax._capture.modes import Mode
from tekfac_jax._capture.value_grad_and_stats import Divisor
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.statistics import FactorKind
from tekfac_jax._layers.types import Params, PyTree
from tekfac_jax._tracing.nnx_modules import observed

__all__ = ["check_capture", "find_layers", "fisher_stats", "value_grad_and_stats"]

R = TypeVar("R")
# A module divided into its structure, its parameters and all other state.
_Parts: TypeAlias = tuple[nnx.GraphDef[nnx.Module], nnx.State, nnx.State]


def find_layers(
    loss_fn: Callable[..., PyTree],
    model: nnx.Module,
    *args: object,
    skip: Skip = None,
    norm: Norm = "fallback",
    **kwargs: object,
) -> Layers:
    """Finds the layers of an nnx module whose curvature can be captured exactly.

    Args:
        loss_fn: the loss, or any function of (model, *args, **kwargs) that applies the module.
        model: the module; it is not changed.
        *args: the other arguments, arrays or static.
        skip: regular expression searched in the layer's path, or predicate on the path; layers
            that match are left out.
        norm: as in `tekfac_jax.find_layers`.
        **kwargs: keyword arguments of `loss_fn`.

    Returns:
        `Layers`; a path consists of the names of the module's attributes, joined with ``/``.

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
    return tekfac.find_layers(fn, nnx.as_pure(params), rest, *args, skip=skip, norm=norm, **kwargs)


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
    """`nnx.value_and_grad` that also returns curvature statistics.

    Args:
        loss_fn: scalar loss of (model, *args, **kwargs). The leading axis of every layer input is
            the batch.
        layers: from `find_layers` of this module.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        reduction: as in `tekfac_jax.value_grad_and_stats`.
        loss_scale: as in `tekfac_jax.value_grad_and_stats`, like all arguments below.
        examples: how many examples count.
        mode: ``"raw"`` or ``"reduced"``. With ``"reduced"``, pass
            ``opt_state=optimizer.opt_state`` when you call the function.
        factors: which factors, with ``mode="reduced"``.

    Returns:
        Function of (model, *args, **kwargs) that returns ``(value, grads, stats)``, or
        ``((value, aux), grads, stats)``. `grads` is what `nnx.grad` returns; pass it to
        ``optimizer.update(model, grads, stats=stats)``. All other state of the model (BatchNorm's
        averages, random streams) is updated in place, as by `nnx.value_and_grad`.

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

    def run(
        fn: Callable[..., PyTree],
        params: nnx.State,
        rest: nnx.State,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[nnx.State, tuple[PyTree, Params, PyTree]]:
        grad_fn = tekfac.value_grad_and_stats(
            fn, layers, has_aux=True, reduction=reduction, loss_scale=loss_scale,
            examples=examples, mode=mode, factors=factors,
        )  # fmt: skip
        (loss, (aux, rest)), grads, stats = grad_fn(nnx.as_pure(params), rest, *args, **kwargs)
        return rest, ((loss, aux) if has_aux else loss, _like(params, grads), stats)

    return _of_model(run, loss_fn, has_aux)


def check_capture(
    loss_fn: Callable[..., PyTree],
    layers: Layers,
    model: nnx.Module,
    *args: object,
    has_aux: bool = False,
    **kwargs: object,
) -> dict[str, float]:
    """Compares the sum of the captured per-example gradients with the gradient, layer by layer.

    Args:
        loss_fn: as for `value_grad_and_stats`.
        layers: from `find_layers` of this module.
        model: argument 0 of `loss_fn`; it is not changed.
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
    predict_fn: Callable[..., PyTree],
    layers: Layers,
    *,
    likelihood: Likelihood,
    estimator: Estimator = "sampled",
    has_aux: bool = False,
    mode: Mode = "raw",
    factors: FactorKind = "exact",
) -> Callable[..., PyTree]:
    """Curvature statistics from labels that the module itself predicts.

    Args:
        predict_fn: function of (model, *args, **kwargs) that returns the outputs, such as logits.
        layers: from `find_layers` of this module.
        likelihood: as in `tekfac_jax.fisher_stats`, like all arguments below.
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

    def run(
        fn: Callable[..., PyTree],
        params: nnx.State,
        rest: nnx.State,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[nnx.State, PyTree]:
        stats_fn = tekfac.fisher_stats(
            fn, layers, likelihood=likelihood, estimator=estimator, has_aux=True, mode=mode,
            factors=factors,
        )  # fmt: skip
        (aux, rest), stats = stats_fn(nnx.as_pure(params), rest, *args, **kwargs)
        return rest, (aux, stats) if has_aux else stats

    return _of_model(run, predict_fn, has_aux)


def _of_model(
    run: Callable[..., tuple[nnx.State, R]], fn: Callable[..., PyTree], has_aux: bool
) -> Callable[..., R]:
    """A function of (model, *args, **kwargs) that also updates the model's other state.

    Args:
        run: function of (fn, params, rest, args, kwargs) that returns (rest, result).
        fn: the user's function of the model.
        has_aux: whether `fn` returns a pair.
    """

    def wrapped(model: nnx.Module, *args: object, **kwargs: object) -> R:
        graph, params, rest = _split(model)
        if "opt_state" in kwargs:
            kwargs["opt_state"] = nnx.as_pure(kwargs["opt_state"])
        of_parameters = _of_parameters(fn, graph, params, has_aux=has_aux)
        rest, result = run(of_parameters, params, rest, args, kwargs)
        nnx.update(model, rest)
        return result

    return wrapped


def _split(model: nnx.Module) -> _Parts:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    if isinstance(model, nnx.State) or not jax.tree.leaves(params):
        raise ValueError(
            f"argument 0 must be an nnx.Module with an nnx.Param, got {type(model).__name__}; "
            "for linen parameters, use the function of the same name in tekfac_jax"
        )
    return graph, params, rest


def _like(state: nnx.State, values: Params) -> nnx.State:
    """`state` with its values replaced by the leaves of `values`, in order."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(values))


def _of_parameters(
    loss_fn: Callable[..., PyTree],
    graph: nnx.GraphDef[nnx.Module],
    params: nnx.State,
    *,
    has_aux: bool = False,
) -> Callable[..., tuple[PyTree, tuple[PyTree, nnx.State]]]:
    """The loss as a function of (parameters, other state, *args) that also returns that state."""

    def fn(
        values: Params, rest: nnx.State, *args: object, **kwargs: object
    ) -> tuple[PyTree, tuple[PyTree, nnx.State]]:
        model = nnx.merge(graph, _like(params, values), rest)
        for _, module in nnx.iter_modules(model):
            if callable(module):
                # Python looks up __call__ in the class, and the class survives nnx's transforms.
                object.__setattr__(module, "__class__", observed(type(module)))
        result = loss_fn(model, *args, **kwargs)
        loss, aux = result if has_aux else (result, None)
        return loss, (aux, nnx.state(model, nnx.Not(nnx.Param)))

    return fn
