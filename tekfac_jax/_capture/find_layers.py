"""Finds the layers that can be captured, and lists the reasons for the others."""

import inspect
from collections.abc import Callable
from typing import Literal, get_args

from tekfac_jax._arguments import check_choice
from tekfac_jax._capture.coverage import Skip, as_predicate, check_skip, judge, nothing_found
from tekfac_jax._capture.plan import common_batch_size
from tekfac_jax._capture.value_grad_and_stats import value_grad_and_stats
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.types import Params, PyTree
from tekfac_jax._tracing.trace import trace_layers

Norm = Literal["fallback", "unitwise"]


def find_layers(
    fn: Callable[..., PyTree],
    params: Params,
    *args: object,
    skip: Skip = None,
    norm: Norm = "fallback",
    **kwargs: object,
) -> Layers:
    """Finds the layers of a Flax linen network whose curvature can be captured exactly.

    The function is traced once, without arithmetic. Print the result: it lists the covered layers
    and, for each parameter that is not covered, the reason.

    Args:
        fn: the loss, or any function of the parameters that applies the network.
        params: argument 0 of `fn`, a pytree of arrays (or of `jax.ShapeDtypeStruct`).
        *args: its other arguments. Those without a shape (``train=True``) stay static.
        skip: regular expression searched in the layer's path, or predicate on the path; layers
            that match are left out.
        norm: ``"unitwise"`` covers normalisations (`nn.LayerNorm`, `nn.RMSNorm`, `nn.GroupNorm`,
            `nn.InstanceNorm`, `nn.BatchNorm`): each feature's scale and bias get their exact 2×2
            Fisher block. ``"fallback"`` leaves them uncovered.
        **kwargs: keyword arguments of `fn`.

    Returns:
        `Layers`, a frozen and hashable mapping from path to `LayerSpec`.

    Raises:
        ValueError: no layer can be captured, the layers disagree on the batch size, `norm` is
            unknown, or `skip` is not a regular expression or matches no layer.

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


# --- checks ----------------------------------------------------------------------------------


def _check_keywords(fn: Callable[..., PyTree], kwargs: dict[str, object]) -> None:
    """Raises for an option of `value_grad_and_stats` that would be passed to `fn`."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # not a function, or one without a signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    options = inspect.signature(value_grad_and_stats).parameters
    for name in kwargs:
        if name in options and name not in parameters:
            raise ValueError(
                f"{name}= is an option of value_grad_and_stats; find_layers takes only skip= and "
                "norm= besides the function and its arguments"
            )
