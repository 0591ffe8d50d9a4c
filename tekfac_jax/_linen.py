"""Listening to the modules of `flax.linen`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from tekfac_jax._flax_layers import describe, input_dtype, is_supported, kernel_of
from tekfac_jax._record import Recorder


def observer(recorder: Recorder) -> Callable[..., Any]:
    """An interceptor for `nn.intercept_methods` that tells the recorder of every call."""

    def observe(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        with recorder.module((args, kwargs, module.variables)):
            if method == "setup":
                return next_fun(*args, **kwargs)
            kind = type(module)
            if method != "__call__" or not is_supported(kind):
                result = next_fun(*args, **kwargs)
                recorder.other(_parameters_of(module), kind.__name__)
                return result
            x = args[0] if args else kwargs.get("inputs")
            parameters = _parameters_of(module)
            kernel = kernel_of(kind, parameters)
            if not hasattr(x, "shape") or kernel is None:  # no array, or a call of `init`
                return next_fun(*args, **kwargs)
            return recorder.layer(
                lambda: next_fun(*args, **kwargs),
                x,
                parameters,
                kernel,
                lambda y: describe(kind, module, x, y, kernel),
                input_dtype(kind, module, x, parameters),
                f"{kind.__name__} {'/'.join(module.path) or '~'}",
            )

    return observe


def _parameters_of(module: nn.Module) -> dict[str, Any]:
    """The arrays that stand directly in the module's own parameter dict."""
    own = module.variables.get("params", {})
    return {name: nn.unbox(value) for name, value in own.items() if not isinstance(value, Mapping)}
