"""The abstract trace: which layers a function calls, with which shapes, and which calls are exact.

An interceptor notes every layer call and leaves markers for `_usage` to read. No arithmetic is
done and nothing is differentiated here.
"""

import collections
import contextlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.linen import dtypes
from jax.experimental.xla_metadata import set_xla_metadata

from tekfac_jax._flax_layers import describe, is_supported
from tekfac_jax._layers import (
    Capture,
    Layers,
    LayerSpec,
    join_path,
    parameter_path,
    replace,
    zeros_like,
)
from tekfac_jax._usage import Marked, Usage, mark, read_usage

Skip = str | Callable[[str], bool] | None
Captures = dict[str, tuple[Capture, ...]]


class Call(NamedTuple):
    """One call of a layer of a supported type, as the interceptor saw it."""

    number: int
    key: tuple[tuple[str, ...], type, int]  # module path, type, how many calls before it
    described: LayerSpec | str  # the spec, still without a path, or why there is none
    input: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct
    kernel_shape: tuple[int, ...]
    type_name: str


class Trace(NamedTuple):
    calls: list[Call]
    owners: dict[int, str]  # marker number -> type of a module of no supported type
    differentiated: set[int]  # numbers of calls that the function itself differentiates
    usage: Usage
    paths: list[tuple[Any, ...]]  # key path of each leaf of argument 0
    output: Any


_trace_numbers = itertools.count()


def fresh_trace() -> Any:
    """A context in which nothing that was traced before is found in JAX's caches.

    `nn.jit` keeps its traces; a cached one would run no interceptor, or one that closes over
    the slots of a step long gone. The metadata is part of the cache key and changes no number.
    """
    return set_xla_metadata(tekfac_trace=str(next(_trace_numbers)))


def trace_layers(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    """Traces ``fn(params, *args, **kwargs)`` without arithmetic and notes each layer call."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    others, others_treedef = jax.tree.flatten((args, kwargs))
    is_array = [_is_traced(leaf) for leaf in others]
    calls: list[Call] = []
    owners: dict[int, str] = {}
    differentiated: set[int] = set()
    static_output: list[Any] = []

    def traced(leaves: list[Any], arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        merged = [
            next(remaining) if is_arr else leaf
            for leaf, is_arr in zip(others, is_array, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(others_treedef, merged)
        with contextlib.ExitStack() as stack:
            observer = _observer(calls, owners, differentiated, stack)
            stack.enter_context(nn.intercept_methods(observer))
            output = fn(jax.tree.unflatten(treedef, leaves), *args, **kwargs)
        # An auxiliary output may hold anything; a trace returns arrays only.
        outputs, output_treedef = jax.tree.flatten(output)
        static_output[:] = [output_treedef, [getattr(o, "aval", o) for o in outputs]]
        return [o for o in outputs if hasattr(o, "dtype")]

    arrays = [leaf for leaf, is_arr in zip(others, is_array, strict=True) if is_arr]
    with fresh_trace():
        jaxpr = jax.make_jaxpr(traced)(leaves, arrays)
    output = jax.tree.unflatten(*static_output)
    return Trace(calls, owners, differentiated, read_usage(jaxpr, len(leaves)), paths, output)


def _is_traced(leaf: Any) -> bool:
    """Arrays are traced; Python's and numpy's scalars, like every other object, stay static."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic)


def _observer(
    calls: list[Call],
    owners: dict[int, str],
    differentiated: set[int],
    stack: contextlib.ExitStack,
) -> Callable[..., Any]:
    """Interceptor of the abstract trace: notes and marks, changes nothing.

    After each layer the trace is fresh again: a function that is traced once and called twice
    would show the interceptor one call only.
    """
    numbers = itertools.count()
    counts: collections.Counter[Any] = collections.Counter()

    def observe(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, number = context.module, next(numbers)
        if context.method_name == "setup":
            return next_fun(*args, **kwargs)
        if context.method_name != "__call__" or not is_supported(module):
            result = next_fun(*args, **kwargs)
            _mark_parameters(module, number, prefix="other_")
            owners[number] = type(module).__name__
            return result
        x = layer_input(args, kwargs)
        parameters = parameters_of(module)
        if x is None or "kernel" not in parameters:  # no array in, or a call of `init`
            return next_fun(*args, **kwargs)
        _mark_parameters(module, number)
        mark(x, number, "begin")
        y = _watched(next_fun(*args, **kwargs), lambda: differentiated.add(number))
        stack.enter_context(fresh_trace())
        mark(y, number, "end")
        key = call_key(module, counts)
        dtype = dtypes.canonicalize_dtype(x, *parameters.values(), dtype=module.dtype)
        calls.append(
            Call(
                number,
                key,
                describe(module, x, y, parameters["kernel"]),
                jax.eval_shape(lambda x: x.astype(dtype), x),
                jax.eval_shape(lambda y: y, y),
                parameters["kernel"].shape,
                type(module).__name__,
            )
        )
        return y

    return observe


def _watched(y: jax.Array, on_derivative: Callable[[], None]) -> jax.Array:
    """`y`; calls `on_derivative` where the traced function differentiates it.

    The trace itself differentiates nothing, so the rule runs only for a `jax.grad`, `jax.vjp` or
    `jax.jvp` inside the function. The cotangents of that derivative would reach the capture as
    if they were the loss's, or, where only the primal output is used, none would.
    """

    @jax.custom_jvp
    def watched(y: jax.Array) -> jax.Array:
        return y

    @watched.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        on_derivative()
        return primals[0], tangents[0]

    return watched(y)


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs.get("inputs")
    return x if hasattr(x, "shape") else None


def call_key(module: nn.Module, counts: collections.Counter[Any]) -> Any:
    """Names a call of a layer so that both traces agree on it."""
    key = (module.path, type(module))
    counts[key] += 1
    return (*key, counts[key] - 1)


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The arrays that stand directly in the module's own parameter dict."""
    own = module.variables.get("params", {})
    return {name: nn.unbox(value) for name, value in own.items() if not isinstance(value, Mapping)}


def _mark_parameters(module: nn.Module, number: int, prefix: str = "") -> None:
    for name, value in parameters_of(module).items():
        if hasattr(value, "shape"):
            mark(value, number, prefix + re.sub(r"\W", "_", name))


# --- from a trace to layers ------------------------------------------------------------------


class Findings(NamedTuple):
    specs: dict[str, LayerSpec]
    covered: dict[str, list[Call]]
    uncovered: dict[str, str]  # parameter path -> reason
    homeless: list[str]  # layers whose kernel is no leaf of argument 0


def judge(trace: Trace, skip: Callable[[str], bool]) -> Findings:
    """Decides for each layer whether it is captured, and why not."""
    found: dict[str, list[tuple[Call, LayerSpec | str]]] = {}
    leaves: dict[str, set[int]] = {}
    reasons: dict[int, str] = {}
    homeless = []
    for call in trace.calls:
        marks = {role: m for (n, role), m in trace.usage.marked.items() if n == call.number}
        if call.number in trace.differentiated:
            verdict: LayerSpec | str = _DIFFERENTIATED
        elif "begin" in marks:
            verdict = _verdict(call, marks, trace)
        else:
            continue  # a trace that was thrown away: scan bodies are traced twice
        kernel = marks["kernel"].leaf if "kernel" in marks else None
        if kernel is None:
            homeless.append(f"{call.type_name} {'/'.join(call.key[0]) or '~'}: {verdict}")
            continue
        path = join_path(trace.paths[kernel][:-1])
        found.setdefault(path, []).append((call, verdict))
        leaves.setdefault(path, set()).update(m.leaf for m in marks.values() if m.leaf is not None)

    specs: dict[str, LayerSpec] = {}
    covered: dict[str, list[Call]] = {}
    for path, uses in found.items():
        verdict = _joint_verdict(path, [v for _, v in uses], leaves[path], trace, skip)
        if isinstance(verdict, str):
            reasons.update(dict.fromkeys(leaves[path], verdict))
        else:
            specs[path] = verdict
            covered[path] = [call for call, _ in uses]
            reasons.update(dict.fromkeys(leaves[path], ""))
    for (number, _), marked in trace.usage.marked.items():
        if marked.leaf is not None and number in trace.owners:
            reasons.setdefault(marked.leaf, f"{trace.owners[number]} is not a supported layer")
    unknown = "no supported layer was seen to use it as its own"
    if homeless:
        unknown += f" (seen with other kernels: {'; '.join(sorted(set(homeless)))})"
    uncovered = {
        join_path(path): reasons.get(i, unknown)
        for i, path in enumerate(trace.paths)
        if reasons.get(i) != ""
    }
    return Findings(specs, covered, uncovered, homeless)


_DIFFERENTIATED = "differentiated inside the function itself (by jax.grad, vjp, jvp, linearize)"


def _verdict(call: Call, marks: dict[str, Marked], trace: Trace) -> LayerSpec | str:
    """The spec of one call, or why that call cannot be captured."""
    begin, kernel, bias = marks["begin"], marks["kernel"], marks.get("bias")
    if call.number in trace.usage.repeated:
        return "inside a jitted or checkpointed function that is called more than once"
    if begin.inside:
        return f"inside {begin.inside}: what happens there cannot be captured yet"
    if begin.ndim != len(call.input.shape):
        return "inside vmap: its batch axis is hidden; let the layer see the whole batch"
    if kernel.leaf is None:
        return "its kernel is computed from argument 0, or comes from elsewhere"
    *_, name = trace.paths[kernel.leaf]
    if join_path((name,)) != "kernel":
        return "its kernel is boxed in metadata: pass flax.linen.unbox(params)"
    if kernel.ndim != len(call.kernel_shape):
        return "its kernel is stacked (vmap over parameters)"
    if isinstance(call.described, str):
        return call.described
    home = trace.paths[kernel.leaf][:-1]
    if call.described.use_bias and (
        bias is None or bias.leaf is None or trace.paths[bias.leaf][:-1] != home
    ):
        return "its bias is not a leaf beside its kernel in argument 0"
    return call.described


def _joint_verdict(
    path: str,
    verdicts: Sequence[LayerSpec | str],
    leaves: set[int],
    trace: Trace,
    skip: Callable[[str], bool],
) -> LayerSpec | str:
    """The spec of all calls of the layer at `path`, or why it is not covered."""
    for verdict in verdicts:
        if isinstance(verdict, str):
            return verdict
    specs: list[LayerSpec] = [v for v in verdicts if isinstance(v, LayerSpec)]
    if len(set(specs)) > 1:
        return "tied: layers of different kinds share this parameter"
    if leaves & trace.usage.entangled:
        return "tied: the loss also uses it outside this layer"
    if skip(path):
        return "skipped on request"
    positions = sum(spec.positions for spec in specs)
    return replace(specs[0], path=path, positions=positions)


def as_predicate(skip: Skip) -> Callable[[str], bool]:
    if skip is None:
        return lambda path: False
    if isinstance(skip, str):
        pattern = re.compile(skip)
        return lambda path: pattern.search(path) is not None
    if callable(skip):
        return skip
    raise ValueError(f"skip must be a regular expression or a predicate on the path, got {skip!r}")


def nothing_found(trace: Trace, findings: Findings) -> str:
    if not trace.paths:
        return (
            "argument 0 holds no arrays: pass the parameters as the first argument of the function"
        )
    if findings.homeless:
        return (
            "no layer can be captured: layers were called, but none owns a kernel in argument 0 "
            "(the parameters must be the first argument of the function, and reach the layers "
            "unchanged):\n  " + "\n  ".join(findings.homeless)
        )
    lines = "\n  ".join(f"{path}: {why}" for path, why in sorted(findings.uncovered.items()))
    return (
        "no layer can be captured: there is no nn.Dense, nn.DenseGeneral or nn.Conv among the "
        f"parameters of argument 0 that is supported and not skipped:\n  {lines}"
    )


# --- from layers to a plan for one set of shapes ---------------------------------------------


class Plan(NamedTuple):
    """Which call fills which slot, for the shapes of one trace."""

    calls: dict[str, list[Call]]
    batch_size: int
    cached: bool  # whether a call hides in something that JAX traces only once
    output: Any

    def slots(self) -> Captures:
        return {
            path: tuple(Capture(zeros_like(c.input), zeros_like(c.output)) for c in calls)
            for path, calls in self.calls.items()
        }


def batch_plan(
    fn: Callable[..., Any],
    layers: Layers,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Plan:
    """Traces `fn` for these arguments and holds what it finds against `layers`."""
    trace = trace_layers(fn, params, args, kwargs)
    findings = judge(trace, lambda path: False)
    for path, spec in layers.items():
        found = findings.specs.get(path)
        if found is None:
            why = findings.uncovered.get(parameter_path(path, "kernel"))
            raise ValueError(
                f"layer {path!r} cannot be captured here: "
                f"{why or 'argument 0 has no such parameter'}. "
                "Call find_layers with the function and arguments that are used here."
            )
        if found != spec:
            raise ValueError(
                f"layer {path!r} has changed since find_layers: it was {spec}, it is {found}. "
                "Call find_layers again."
            )
    covered = {path: findings.covered[path] for path in layers}
    # Of any layer, captured or not: a cached trace would shift the count of the calls after it.
    cached = any(marked.cached for marked in trace.usage.marked.values())
    return Plan(covered, common_batch_size(trace, covered), cached, trace.output)


def common_batch_size(trace: Trace, covered: Mapping[str, list[Call]]) -> int:
    sizes = {(path, call.input.shape[0]) for path, calls in covered.items() for call in calls}
    if len({size for _, size in sizes}) > 1:
        listed = ", ".join(f"{path}: {size}" for path, size in sorted(sizes))
        raise ValueError(
            f"layers disagree on the batch size, the leading axis of their inputs ({listed}). "
            "Keep the batch as the leading axis, or leave the odd ones out with "
            "find_layers(..., skip=...)."
        )
    _, size = next(iter(sizes))
    if size == 0:
        raise ValueError("the batch is empty: the leading axis of the layers' inputs is 0")
    return size
