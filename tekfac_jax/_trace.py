"""The abstract trace: which layers a function calls, with which shapes, and which calls are exact.

An interceptor notes every layer call and leaves markers for `_usage` to read. No arithmetic is
done and nothing is differentiated here.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tekfac_jax._flax_layers import describe, input_dtype, is_supported, kernel_of
from tekfac_jax._fresh import make_fresh_jaxpr
from tekfac_jax._layers import (
    Capture,
    Layers,
    LayerSpec,
    join_path,
    parameter_path,
    replace,
    zeros_like,
)
from tekfac_jax._marks import mark
from tekfac_jax._replay import Slots, replay
from tekfac_jax._usage import Leaf, Occurrence, Usage, read_usage

Skip = str | Callable[[str], bool] | None
Captures = dict[str, tuple[Capture, ...]]


class Call(NamedTuple):
    """One call of a layer of a supported type, as the interceptor saw it."""

    described: LayerSpec | str  # the spec, still without a path, or why there is none
    input: jax.ShapeDtypeStruct  # in the dtype of the layer's arithmetic
    output: jax.ShapeDtypeStruct
    model: int  # number of the outermost module call around it
    name: str  # type and module path, for messages


class Trace(NamedTuple):
    jaxpr: core.ClosedJaxpr  # of the leaves of argument 0 and `arrays`
    arrays: list[Any]  # the arrays among the other arguments
    calls: dict[int, Call]  # by number
    owners: dict[int, str]  # call number -> type of a module of no supported type
    differentiated: set[int]  # numbers of calls that the function itself differentiates
    usage: Usage
    paths: list[tuple[Any, ...]]  # key path of each leaf of argument 0
    output: Any  # what the function returned, arrays as their shapes

    def run(self, params: Any, slots: Slots) -> Any:
        """The function's output for other values of its first argument, with tagged layers."""
        leaves = jax.tree.leaves(params)
        outputs = replay(self.jaxpr.jaxpr, self.jaxpr.consts, [*leaves, *self.arrays], slots)
        remaining = iter(outputs)
        return jax.tree.map(lambda o: next(remaining) if isinstance(o, _Output) else o, self.output)


def trace_layers(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    """Traces ``fn(params, *args, **kwargs)`` without arithmetic and notes each layer call."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    others, others_treedef = jax.tree.flatten((args, kwargs))
    is_array = [_is_traced(leaf) for leaf in others]
    calls: dict[int, Call] = {}
    owners: dict[int, str] = {}
    differentiated: set[int] = set()
    output: list[Any] = []

    def traced(leaves: list[Any], arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        merged = [
            next(remaining) if is_arr else leaf
            for leaf, is_arr in zip(others, is_array, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(others_treedef, merged)
        with nn.intercept_methods(_observer(calls, owners, differentiated)):
            result = fn(jax.tree.unflatten(treedef, leaves), *args, **kwargs)
        # An auxiliary output may hold anything; a trace returns arrays only.
        output[:] = [jax.tree.map(_output_shape, result)]
        return [o for o in jax.tree.leaves(result) if isinstance(o, jax.Array)]

    arrays = [leaf for leaf, is_arr in zip(others, is_array, strict=True) if is_arr]
    jaxpr = make_fresh_jaxpr(traced, leaves, arrays)
    usage = read_usage(jaxpr, len(leaves))
    return Trace(jaxpr, arrays, calls, owners, differentiated, usage, paths, output[0])


def _is_traced(leaf: Any) -> bool:
    """Arrays are traced; Python's and numpy's scalars, like every other object, stay static."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic)


class _Output(jax.ShapeDtypeStruct):
    """Stands for an array that the function returns."""


def _output_shape(leaf: Any) -> Any:
    return _Output(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def _observer(
    calls: dict[int, Call], owners: dict[int, str], differentiated: set[int]
) -> Callable[..., Any]:
    """Interceptor of the abstract trace: notes and marks, changes nothing."""
    numbers = itertools.count()
    model: list[int] = []  # number of the outermost module call, while there is one

    def observe(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if model:
            return inside(next_fun, args, kwargs, context)
        model.append(next(numbers))
        try:
            for leaf in jax.tree.leaves((args, kwargs, context.module.variables)):
                if isinstance(leaf, jax.Array):
                    mark(leaf, model[0], "model", lambda: None)
                    break
            return inside(next_fun, args, kwargs, context)
        finally:
            model.pop()

    def inside(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, number = context.module, next(numbers)

        def leave_mark(value: Any, role: str) -> Any:
            return mark(value, number, role, lambda: differentiated.add(number))

        def mark_parameters(prefix: str = "", kernel: Any = None) -> None:
            for name, value in _parameters_of(module).items():
                if hasattr(value, "shape"):
                    role = "kernel" if value is kernel else re.sub(r"\W", "_", name)
                    leave_mark(value, prefix + role)

        if context.method_name == "setup":
            return next_fun(*args, **kwargs)
        if context.method_name != "__call__" or not is_supported(module):
            result = next_fun(*args, **kwargs)
            mark_parameters("other_")
            owners[number] = type(module).__name__
            return result
        x = args[0] if args else kwargs.get("inputs")
        parameters = _parameters_of(module)
        kernel = kernel_of(module, parameters)
        if not hasattr(x, "shape") or kernel is None:  # no array, or a call of `init`
            return next_fun(*args, **kwargs)
        leave_mark(x, "begin")
        mark_parameters(kernel=kernel)
        y = leave_mark(next_fun(*args, **kwargs), "end")
        dtype = input_dtype(module, x, parameters)
        calls[number] = Call(
            describe(module, x, y, kernel),
            jax.eval_shape(lambda x: x.astype(dtype), x),
            jax.eval_shape(lambda y: y, y),
            model[0],
            f"{type(module).__name__} {'/'.join(module.path) or '~'}",
        )
        return y

    return observe


def _parameters_of(module: nn.Module) -> dict[str, Any]:
    """The arrays that stand directly in the module's own parameter dict."""
    own = module.variables.get("params", {})
    return {name: nn.unbox(value) for name, value in own.items() if not isinstance(value, Mapping)}


# --- from a trace to layers ------------------------------------------------------------------


class Use(NamedTuple):
    """One call of a layer that is captured."""

    slot: int  # which of the slots of a replay is its
    occurrence: Occurrence
    call: Call


class Findings(NamedTuple):
    specs: dict[str, LayerSpec]
    covered: dict[str, list[Use]]
    uncovered: dict[str, str]  # parameter path -> reason
    homeless: list[str]  # layers whose kernel is no leaf of argument 0


def judge(trace: Trace, skip: Callable[[str], bool]) -> Findings:
    """Decides for each layer whether it is captured, and why not."""
    found: dict[str, list[tuple[Use, LayerSpec | str]]] = {}
    leaves: dict[str, set[int]] = {}
    reasons: dict[int, str] = {}
    seen = {occurrence.number for occurrence in trace.usage.occurrences}
    # The markers of a call that is differentiated may have vanished with their equations.
    homeless = [f"{trace.calls[n].name}: {_DIFFERENTIATED}" for n in trace.differentiated - seen]
    slots = itertools.count()
    for occurrence in trace.usage.occurrences:
        call = trace.calls[occurrence.number]
        verdict = _verdict(call, occurrence, trace)
        use = Use(-1 if occurrence.inside else next(slots), occurrence, call)
        marks = occurrence.marks
        kernel = marks["kernel"].leaf if "kernel" in marks else None
        if kernel is None:
            homeless.append(f"{call.name}: {verdict}")
            continue
        path = join_path(trace.paths[kernel.number][:-1])
        found.setdefault(path, []).append((use, verdict))
        parameters = [m.leaf.number for m in marks.values() if m.leaf is not None]
        leaves.setdefault(path, set()).update(parameters)

    specs: dict[str, LayerSpec] = {}
    covered: dict[str, list[Use]] = {}
    for path, uses in found.items():
        verdict = _joint_verdict(path, [v for _, v in uses], leaves[path], trace, skip)
        if isinstance(verdict, str):
            reasons.update(dict.fromkeys(leaves[path], verdict))
        else:
            specs[path] = verdict
            covered[path] = [use for use, _ in uses]
            reasons.update(dict.fromkeys(leaves[path], ""))
    for leaf, number in trace.usage.others.items():
        reasons.setdefault(leaf, f"{trace.owners[number]} is not a supported layer")
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


def _verdict(call: Call, occurrence: Occurrence, trace: Trace) -> LayerSpec | str:
    """The spec of one call, or why that call cannot be captured."""
    if occurrence.number in trace.differentiated:
        return _DIFFERENTIATED
    if occurrence.inside:
        return f"inside {occurrence.inside}: what happens there cannot be captured"
    marks = occurrence.marks
    begin, kernel, bias, end = (marks.get(key) for key in ("begin", "kernel", "bias", "end"))
    if begin is None or kernel is None or end is None:
        return "its call is not whole in the program"
    vmapped = end.vmapped
    if kernel.vmapped != vmapped:
        return "inside vmap: its batch axis is hidden; let the layer see the whole batch"
    if begin.vmapped not in ((), vmapped):
        return "inside several vmaps that do not all run over its input"
    if kernel.leaf is None:
        return "its kernel is computed from argument 0, or comes from elsewhere"
    *_, name = trace.paths[kernel.leaf.number]
    spec = call.described
    if isinstance(spec, str):
        return spec
    if join_path((name,)) != spec.kernel_name:
        return f"its {spec.kernel_name} is boxed in metadata: pass flax.linen.unbox(params)"
    kernel_stack = _stack_axes(kernel.leaf, len(vmapped))
    if kernel_stack is None:
        return "its kernel is transposed"
    bias_stack: tuple[int, ...] | None = ()
    if spec.use_bias:
        home = trace.paths[kernel.leaf.number][:-1]
        if bias is None or bias.leaf is None or trace.paths[bias.leaf.number][:-1] != home:
            return "its bias is not a leaf beside its kernel in argument 0"
        bias_stack = _stack_axes(bias.leaf, len(vmapped))
        same = [x is None for x in bias.leaf.scanned] == [x is None for x in kernel.leaf.scanned]
        if bias_stack is None or not same or bias.vmapped != vmapped:
            return "its bias is not stacked as its kernel is"
    around = trace.usage.models.get(call.model, 0)
    if not all(over for _, over in _scans(occurrence)[:around]):
        return "inside a scan around the whole model, whose axis may be that of the examples"
    stack = (*(n for n, over in _scans(occurrence) if over), *vmapped)
    repeats = [n for n, over in _scans(occurrence) if not over]
    return replace(
        spec,
        stack=stack,
        kernel_stack=kernel_stack,
        bias_stack=bias_stack,
        positions=spec.positions * int(np.prod(repeats, dtype=int)),
    )


def _stack_axes(leaf: Leaf, vmapped: int) -> tuple[int, ...] | None:
    """Axes of a leaf that scans and vmaps run over; None if the others changed their order."""
    if list(leaf.axes[vmapped:]) != sorted(leaf.axes[vmapped:]):
        return None
    return (*(axis for axis in leaf.scanned if axis is not None), *leaf.axes[:vmapped])


def _scans(occurrence: Occurrence) -> list[tuple[int, bool]]:
    """For each scan around a call its length, and whether it runs over the layer's parameters."""
    leaf = occurrence.marks["kernel"].leaf
    assert leaf is not None
    return [(n, axis is not None) for n, axis in zip(occurrence.scans, leaf.scanned, strict=True)]


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
    """A traced function, and which of its layer calls fills which slot."""

    trace: Trace
    uses: dict[str, list[Use]]
    batch_size: int

    def slots(self) -> Captures:
        """Zeros of the shapes of what will be captured: [*stack, N, *repeats, ...]."""

        def slot(use: Use) -> Capture:
            lead = (*use.occurrence.scans, *use.occurrence.marks["end"].vmapped)
            axes = _repeated_axes(use.occurrence)

            def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
                stacked = jnp.broadcast_to(zeros_like(shape), (*lead, *shape.shape))
                return jnp.moveaxis(stacked, *axes)

            return Capture(zeros(use.call.input), zeros(use.call.output))

        return {path: tuple(map(slot, uses)) for path, uses in self.uses.items()}

    def run(self, params: Any, slots: Captures) -> Any:
        """The function's output, with a tag on each call of a layer."""
        replay_slots: list[Capture | None] = [
            None for o in self.trace.usage.occurrences if not o.inside
        ]
        for path, uses in self.uses.items():
            for use, slot in zip(uses, slots[path], strict=True):
                to, source = _repeated_axes(use.occurrence)
                replay_slots[use.slot] = Capture(*(jnp.moveaxis(x, source, to) for x in slot))
        return self.trace.run(params, replay_slots)


def _repeated_axes(occurrence: Occurrence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the scans that repeat a layer stand in the program, and where in a capture.

    They are further positions: their place is behind the batch.
    """
    scans = _scans(occurrence)
    repeated = tuple(i for i, (_, over) in enumerate(scans) if not over)
    batch = len(scans) - len(repeated) + len(occurrence.marks["end"].vmapped)
    return repeated, tuple(range(batch + 1, batch + 1 + len(repeated)))


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
            why = findings.uncovered.get(parameter_path(path, spec.kernel_name))
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
    return Plan(trace, covered, common_batch_size(covered))


def common_batch_size(covered: Mapping[str, list[Use]]) -> int:
    """The leading axis of the layers' inputs; raises if they disagree."""
    sizes = {(path, use.call.input.shape[0]) for path, uses in covered.items() for use in uses}
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
