"""Observes the module calls of `flax.nnx` and reports them in the terms of linen."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax

from tekfac_jax._layers.types import PyTree
from tekfac_jax._tracing.observe import ModuleCall, observe
from tekfac_jax._tracing.recorder import current_recorder

# The layers that nnx shares with linen: same attributes, same parameters.
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
    """A subclass of `kind` whose calls are reported to the recorder of the trace, if any."""

    def method_of(name: str) -> Callable[..., PyTree]:
        def method(self: nnx.Module, *args: object, **kwargs: object) -> PyTree:
            return _observe(kind, name, self, args, kwargs)

        return method

    methods = {name: method_of(name) for name in ("__call__", "attend") if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


def _observe(
    kind: type,
    method: str,
    module: nnx.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> PyTree:
    """Makes the call and reports it to the recorder in the terms of linen."""
    recorder = current_recorder()
    run = functools.partial(getattr(kind, method), module, *args, **kwargs)
    if recorder is None:
        return run()

    # Only the module's own variables, not those of the modules inside.
    variables = {n: v for n, v in vars(module).items() if isinstance(v, nnx.Variable)}
    parameters = {n: v[...] for n, v in variables.items() if isinstance(v, nnx.Param)}

    def state() -> dict[str, PyTree]:
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


# Defaults of nnx where linen has None, or its own function of the same name.
_DEFAULTS = {
    "dot_general": lax.dot_general,
    "conv_general_dilated": lax.conv_general_dilated,
    "einsum_op": jnp.einsum,
}


def _as_linen(module: nnx.Module) -> SimpleNamespace:
    """The attributes that the layer would have in linen."""
    attributes: dict[str, object] = {
        "dot_general": None, "dot_general_cls": None, "conv_general_dilated_cls": None,
    }  # fmt: skip
    attributes |= {name: value for name, value in vars(module).items() if name[0] != "_"}
    for name, default in _DEFAULTS.items():
        if attributes.get(name) is default:
            attributes[name] = None
    if attributes["promote_dtype"] is nnx_dtypes.promote_dtype:
        attributes["promote_dtype"] = linen_dtypes.promote_dtype
    attributes["use_bias"] = attributes.get("bias") is not None
    if "num_groups" in attributes:  # nnx keeps both num_groups and group_size, linen takes one
        attributes["group_size"] = None
    attributes["batch_dims"] = tuple(getattr(module, "batch_axis", ()))
    if attributes.get("einsum_op") is not None:
        attributes["promote_dtype"] = None  # a custom einsum_op is reported as custom arithmetic
    return SimpleNamespace(**attributes)
