"""Listening to the modules of `flax.linen`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

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
from tekfac_jax._tracing.recorder import Recorder


def observer(recorder: Recorder) -> Callable[..., Any]:
    """An interceptor for `nn.intercept_methods` that tells the recorder of every call."""

    def observe(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        with recorder.module((args, kwargs, module.variables)):
            if method == "setup":
                return next_fun(*args, **kwargs)
            kind, parameters = type(module), _parameters_of(module)
            kernel = kernel_of(kind, parameters)
            if kernel is None or not is_supported(kind, method, norms=recorder.norms):
                result = next_fun(*args, **kwargs)
                recorder.other(parameters, why_not_supported(kind, norms=recorder.norms))
                return result
            x = input_of(args, kwargs)
            if not hasattr(x, "shape"):  # no array
                return next_fun(*args, **kwargs)
            captured = captured_input(kind, method, module, x, parameters)
            if is_norm(kind):
                state = {name: v for name, v in module.variables.items() if name != "params"}
                x = normalised(kind, module, args, kwargs, state, captured.dtype)
            return recorder.layer(
                lambda: next_fun(*args, **kwargs),
                x,
                parameters,
                kernel,
                lambda y: describe(kind, method, module, x, y, kernel),
                captured,
                f"{kind.__name__} {'/'.join(module.path) or '~'}",
            )

    return observe


def _parameters_of(module: nn.Module) -> dict[str, Any]:
    """The arrays that stand directly in the module's own parameter dict."""
    own = module.variables.get("params", {})
    if not isinstance(own, Mapping):  # Flax will say so
        return {}
    return {name: nn.unbox(value) for name, value in own.items() if not isinstance(value, Mapping)}
