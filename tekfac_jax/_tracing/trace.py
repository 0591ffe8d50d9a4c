"""The abstract trace: the program of a function, and which layers it calls.

Each layer call is reported to a recorder, which places markers for `read_usage`. Nothing is
computed or differentiated here.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from tekfac_jax._arguments import LARGEST_INTEGER, check_function
from tekfac_jax._layers.paths import flattened, join_path, unboxed
from tekfac_jax._layers.types import Key, Params, PyTree
from tekfac_jax._tracing.linen import observer
from tekfac_jax._tracing.parameter_usage import Usage, read_usage
from tekfac_jax._tracing.recorder import Recorder, recording
from tekfac_jax._tracing.replay import Tags, replay
from tekfac_jax._tracing.uncached import make_fresh_jaxpr


class Trace(NamedTuple):
    """A traced function, with its layer calls and the way it uses its parameters."""

    jaxpr: core.ClosedJaxpr  # function of the leaves of argument 0, then `arrays`
    arrays: list[jax.Array]  # the arrays among the other arguments
    record: Recorder  # the layer calls that Python saw
    usage: Usage
    paths: list[tuple[Key, ...]]  # key path of each leaf of argument 0
    output: PyTree  # what the function returned, with shapes in place of arrays

    def run(self, params: Params, tags: Tags) -> PyTree:
        """The function's output for other values of argument 0, with tagged layers."""
        leaves = jax.tree.leaves(params)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in (*leaves, *self.arrays)):
            raise ValueError(
                "arguments must be arrays, got jax.ShapeDtypeStruct: shapes suffice only for "
                "find_layers, and inside jax.eval_shape"
            )
        outputs = replay(self.jaxpr.jaxpr, self.jaxpr.consts, [*leaves, *self.arrays], tags)
        remaining = iter(outputs)
        return jax.tree.map(lambda o: next(remaining) if isinstance(o, _Output) else o, self.output)


def trace_layers(
    fn: Callable[..., PyTree],
    params: Params,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    norms: bool,
) -> Trace:
    """Traces ``fn(params, *args, **kwargs)`` without arithmetic and notes each layer call.

    With `norms`, normalisations count as layers.
    """
    check_function("the function", fn)
    _check_no_module(params)
    paths_and_leaves, treedef = flattened(params, "argument 0")
    _check_parameters(paths_and_leaves)
    leaves = [leaf for _, leaf in paths_and_leaves]

    # Arrays among the other arguments are traced, everything else stays static.
    others, others_treedef = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in others if _is_traced(leaf)]
    recorder = Recorder(norms)
    output: list[PyTree] = []

    def traced(leaves: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
        remaining = iter(arrays)
        merged = [next(remaining) if _is_traced(leaf) else leaf for leaf in others]
        args, kwargs = jax.tree.unflatten(others_treedef, merged)
        with recording(recorder), nn.intercept_methods(observer(recorder)):
            result = fn(jax.tree.unflatten(treedef, leaves), *args, **kwargs)
        # An auxiliary output may hold anything; a trace returns only arrays.
        output[:] = [jax.tree.map(_output_shape, result)]
        return [o for o in jax.tree.leaves(result) if isinstance(o, jax.Array)]

    jaxpr = make_fresh_jaxpr(traced, leaves, arrays)
    usage = read_usage(jaxpr, len(leaves))
    paths = [unboxed(path) for path, _ in paths_and_leaves]
    return Trace(jaxpr, arrays, recorder, usage, paths, output[0])


def _check_parameters(paths_and_leaves: list[tuple[tuple[Key, ...], object]]) -> None:
    for path, leaf in paths_and_leaves:
        is_number = isinstance(leaf, float | complex) or (
            isinstance(leaf, int) and abs(leaf) <= LARGEST_INTEGER
        )
        if not is_number and not _is_traced(leaf):
            raise ValueError(
                f"argument 0 has {type(leaf).__name__} at {join_path(path)!r}: parameters must be "
                "arrays of numbers"
            )


def _check_no_module(params: Params) -> None:
    nnx = sys.modules.get("flax.nnx")  # without it there can be no nnx module
    if nnx is not None and isinstance(params, nnx.Module):
        raise ValueError(
            "argument 0 is a module of flax.nnx: use find_layers, value_grad_and_stats, "
            "fisher_stats or check_capture of tekfac_jax.nnx"
        )


def _is_traced(leaf: object) -> TypeGuard[jax.Array]:
    """Whether a leaf is an array. Scalars of Python and NumPy stay static, like other objects."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or isinstance(leaf, np.generic):
        return False
    return not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "OSUMm"  # not numbers


class _Output(jax.ShapeDtypeStruct):
    """The shape of an array that the function returns."""


def _output_shape(leaf: object) -> object:
    return _Output(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf
