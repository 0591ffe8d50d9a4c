"""What happens at each call of a Flax module: the part that linen and nnx share."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from tekfac_jax._layers.spec import LayerSpec
from tekfac_jax._layers.types import PyTree
from tekfac_jax._tracing.layer_types import (
    Layer,
    captured_input,
    describe,
    input_of,
    is_norm,
    is_supported,
    kernel_of,
    normalised,
    why_not_supported,
)
from tekfac_jax._tracing.recorder import Recorder, has_shape


class ModuleCall(NamedTuple):
    """A call of a module, in the terms of `flax.linen`.

    Attributes:
        run: makes the call.
        kind: the module's type in `flax.linen`; any other type is no supported layer.
        method: name of the method that is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        parameters: the arrays among the module's own parameters, by name.
        module: returns the module, or an object with the attributes of `kind`.
        state: returns the module's variables that are not parameters, by collection.
        name: for messages.
    """

    run: Callable[[], PyTree]
    kind: type
    method: str
    args: Sequence[object]
    kwargs: Mapping[str, object]
    parameters: Mapping[str, jax.Array]
    module: Callable[[], Layer]
    state: Callable[[], Mapping[str, PyTree]]
    name: str


def observe(recorder: Recorder, call: ModuleCall) -> PyTree:
    """Makes a call inside `Recorder.module` and reports it to the recorder."""
    kind, method, parameters = call.kind, call.method, call.parameters

    # An unsupported module: its parameters are noted with the reason.
    kernel = kernel_of(kind, parameters)
    if kernel is None or not is_supported(kind, method, norms=recorder.norms):
        result = call.run()
        recorder.other(parameters, why_not_supported(kind, norms=recorder.norms))
        return result
    x = input_of(call.args, call.kwargs)
    if not has_shape(x):
        return call.run()

    # A supported layer: input and output are marked. The input of a normalisation's scale is the
    # normalised array.
    module = call.module()
    captured = captured_input(kind, method, module, x, parameters)
    if is_norm(kind):
        x = normalised(kind, module, call.args, call.kwargs, call.state(), captured.dtype)

    def spec(y: jax.Array) -> LayerSpec | str:
        return describe(kind, method, module, x, y, kernel)

    return recorder.layer(call.run, x, parameters, kernel, spec, captured, call.name)
