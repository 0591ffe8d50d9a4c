"""One call of a Flax module, told to the recorder: the part that linen and nnx share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

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


class ModuleCall(NamedTuple):
    """A call of a module in the terms of `flax.linen`.

    Attributes:
        run: makes the call.
        kind: the module's type in `flax.linen`; any other type is no supported layer.
        method: the name of the method that is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        parameters: the arrays among the module's own parameters, by name.
        module: gives the module, or whatever has the attributes that `kind` has.
        state: gives the module's variables that are no parameters, by collection.
        name: for messages.
    """

    run: Callable[[], Any]
    kind: type
    method: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    parameters: Mapping[str, Any]
    module: Callable[[], Any]
    state: Callable[[], Mapping[str, Any]]
    name: str


def observe(recorder: Recorder, call: ModuleCall) -> Any:
    """Makes a call inside `Recorder.module`, and tells the recorder of it."""
    kind, method, parameters = call.kind, call.method, call.parameters

    # Other modules: their parameters are noted with the reason.
    kernel = kernel_of(kind, parameters)
    if kernel is None or not is_supported(kind, method, norms=recorder.norms):
        result = call.run()
        recorder.other(parameters, why_not_supported(kind, norms=recorder.norms))
        return result
    x = input_of(call.args, call.kwargs)
    if not hasattr(x, "shape"):  # no array
        return call.run()

    # Supported layers: input and output are marked. What a normalisation scales is its input.
    module = call.module()
    captured = captured_input(kind, method, module, x, parameters)
    if is_norm(kind):
        x = normalised(kind, module, call.args, call.kwargs, call.state(), captured.dtype)

    def spec(y: jax.Array) -> Any:
        return describe(kind, method, module, x, y, kernel)

    return recorder.layer(call.run, x, parameters, kernel, spec, captured, call.name)
