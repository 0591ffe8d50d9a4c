"""The abstract trace: the program of a function, and which layers it calls.

The layers tell a recorder, which leaves markers for `_usage` to read. No arithmetic is done and
nothing is differentiated here.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from tekfac_jax._arguments import LARGEST_INTEGER, check_function
from tekfac_jax._layers.paths import flattened, join_path, unboxed
from tekfac_jax._tracing.linen import observer
from tekfac_jax._tracing.parameter_usage import Usage, read_usage
from tekfac_jax._tracing.recorder import Recorder, recording
from tekfac_jax._tracing.replay import Tags, replay
from tekfac_jax._tracing.uncached import make_fresh_jaxpr


class Trace(NamedTuple):
    jaxpr: core.ClosedJaxpr  # of the leaves of argument 0 and `arrays`
    arrays: list[Any]  # the arrays among the other arguments
    record: Recorder  # of the layer calls that Python saw
    usage: Usage
    paths: list[tuple[Any, ...]]  # key path of each leaf of argument 0
    output: Any  # what the function returned, arrays as their shapes

    def run(self, params: Any, tags: Tags) -> Any:
        """The function's output for other values of its first argument, with tagged layers."""
        leaves = jax.tree.leaves(params)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in (*leaves, *self.arrays)):
            raise ValueError(
                "arguments must be arrays where something is computed, got jax.ShapeDtypeStruct: "
                "shapes suffice for find_layers only, and inside of jax.eval_shape"
            )
        outputs = replay(self.jaxpr.jaxpr, self.jaxpr.consts, [*leaves, *self.arrays], tags)
        remaining = iter(outputs)
        return jax.tree.map(lambda o: next(remaining) if isinstance(o, _Output) else o, self.output)


def trace_layers(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    norms: bool,
) -> Trace:
    """Traces ``fn(params, *args, **kwargs)`` without arithmetic and notes each layer call.

    With `norms` normalisations are layers too.
    """
    check_function("the function", fn)
    _check_no_module(params)
    paths_and_leaves, treedef = flattened(params, "argument 0")
    for path, leaf in paths_and_leaves:
        number = isinstance(leaf, float | complex) or (
            isinstance(leaf, int) and abs(leaf) <= LARGEST_INTEGER
        )
        if not number and not _is_traced(leaf):
            raise ValueError(
                f"argument 0 has {type(leaf).__name__} at {join_path(path)!r}: parameters must be "
                "arrays of numbers"
            )
    paths = [unboxed(path) for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    others, others_treedef = jax.tree.flatten((args, kwargs))
    is_array = [_is_traced(leaf) for leaf in others]
    recorder = Recorder(norms)
    output: list[Any] = []

    def traced(leaves: list[Any], arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        merged = [
            next(remaining) if is_arr else leaf
            for leaf, is_arr in zip(others, is_array, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(others_treedef, merged)
        with recording(recorder), nn.intercept_methods(observer(recorder)):
            result = fn(jax.tree.unflatten(treedef, leaves), *args, **kwargs)
        # An auxiliary output may hold anything; a trace returns arrays only.
        output[:] = [jax.tree.map(_output_shape, result)]
        return [o for o in jax.tree.leaves(result) if isinstance(o, jax.Array)]

    arrays = [leaf for leaf, is_arr in zip(others, is_array, strict=True) if is_arr]
    jaxpr = make_fresh_jaxpr(traced, leaves, arrays)
    usage = read_usage(jaxpr, len(leaves))
    return Trace(jaxpr, arrays, recorder, usage, paths, output[0])


def _check_no_module(params: Any) -> None:
    nnx = sys.modules.get("flax.nnx")  # nobody has a module of nnx without it
    if nnx is not None and isinstance(params, nnx.Module):
        raise ValueError(
            "argument 0 is a module of flax.nnx: use find_layers, value_grad_and_stats, "
            "fisher_stats or check_capture of tekfac_jax.nnx"
        )


def _is_traced(leaf: Any) -> bool:
    """Arrays are traced; Python's and numpy's scalars, like every other object, stay static."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or isinstance(leaf, np.generic):
        return False
    return not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "OSUMm"  # no numbers


class _Output(jax.ShapeDtypeStruct):
    """Stands for an array that the function returns."""


def _output_shape(leaf: Any) -> Any:
    return _Output(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf
