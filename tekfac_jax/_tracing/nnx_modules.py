"""Listening to the modules of `flax.nnx`: each call is told in the terms of linen."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax

from tekfac_jax._tracing.observe import ModuleCall, observe
from tekfac_jax._tracing.recorder import current_recorder

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


@functools.cache
def observed(kind: type) -> type:
    """A subclass whose calls tell the recorder of the trace, if there is one."""

    def method_of(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _observe(kind, name, self, args, kwargs)

        return method

    methods = {name: method_of(name) for name in ("__call__", "attend") if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


def _observe(
    kind: type, method: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Makes the call, and tells the recorder of it in the terms of linen."""
    recorder = current_recorder()
    run = functools.partial(getattr(kind, method), module, *args, **kwargs)
    if recorder is None:
        return run()
    variables = {n: v for n, v in vars(module).items() if isinstance(v, nnx.Variable)}
    parameters = {n: v[...] for n, v in variables.items() if isinstance(v, nnx.Param)}

    def state() -> dict[str, Any]:
        stats = {n: v[...] for n, v in variables.items() if isinstance(v, nnx.BatchStat)}
        return {"batch_stats": stats} if stats else {}

    call = ModuleCall(
        run=run,
        kind=_LINEN.get(kind, kind),
        method=method,
        args=args,
        kwargs=kwargs,
        parameters=parameters,
        module=functools.partial(_as_linen, module),
        state=state,
        name=kind.__name__,
    )
    with recorder.module((args, kwargs, parameters)):
        return observe(recorder, call)


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
