"""Observes the module calls of `flax.linen`."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext

from tekfac_jax._layers.types import PyTree
from tekfac_jax._tracing.observe import ModuleCall, observe
from tekfac_jax._tracing.recorder import Recorder


def observer(recorder: Recorder) -> Callable[..., PyTree]:
    """An interceptor for `nn.intercept_methods` that reports every call to the recorder."""

    def intercept(
        next_fun: Callable[..., PyTree],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        context: InterceptorContext,
    ) -> PyTree:
        module, method = context.module, context.method_name

        def state() -> dict[str, PyTree]:
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


def _parameters_of(module: nn.Module) -> dict[str, jax.Array]:
    """The arrays directly in the module's own parameter dict."""
    own = module.variables.get("params", {})
    if not isinstance(own, Mapping):  # Flax raises its own error
        return {}
    return {name: nn.unbox(value) for name, value in own.items() if not isinstance(value, Mapping)}
