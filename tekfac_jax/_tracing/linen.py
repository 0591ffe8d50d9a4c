"""Listening to the modules of `flax.linen`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from tekfac_jax._tracing.observe import ModuleCall, observe
from tekfac_jax._tracing.recorder import Recorder


def observer(recorder: Recorder) -> Callable[..., Any]:
    """An interceptor for `nn.intercept_methods` that tells the recorder of every call."""

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name

        def state() -> dict[str, Any]:
            return {name: v for name, v in module.variables.items() if name != "params"}

        with recorder.module((args, kwargs, module.variables)):
            if method == "setup":
                return next_fun(*args, **kwargs)
            call = ModuleCall(
                run=lambda: next_fun(*args, **kwargs),
                kind=type(module),
                method=method,
                args=args,
                kwargs=kwargs,
                parameters=_parameters_of(module),
                module=lambda: module,
                state=state,
                name=f"{type(module).__name__} {'/'.join(module.path) or '~'}",
            )
            return observe(recorder, call)

    return intercept


def _parameters_of(module: nn.Module) -> dict[str, Any]:
    """The arrays that stand directly in the module's own parameter dict."""
    own = module.variables.get("params", {})
    if not isinstance(own, Mapping):  # Flax will say so
        return {}
    return {name: nn.unbox(value) for name, value in own.items() if not isinstance(value, Mapping)}
