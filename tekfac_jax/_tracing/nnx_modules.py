"""TODO: _tracing/nnx_modules"""

import functools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax

from tekfac_jax._tracing.layer_types import (
    captured_input,
    describe,
    input_of,
    is_norm,
    is_supported,
    kernel_of,
    normalised,
    why_not_supported,
)
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
def telling(kind: type) -> type:
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
