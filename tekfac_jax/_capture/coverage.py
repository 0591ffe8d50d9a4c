"""Which layers of a trace are captured, and why the others are not."""

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tekfac_jax._layers.paths import join_path
from tekfac_jax._layers.spec import LayerSpec, replace
from tekfac_jax._tracing.parameter_usage import Leaf, Occurrence
from tekfac_jax._tracing.recorder import Call
from tekfac_jax._tracing.trace import Trace

_AVERAGES = "not a parameter: pass variables['params'] alone as argument 0"
_DIFFERENTIATED = "differentiated inside the function itself (by jax.grad, vjp, jvp or linearize)"
UNSEEN = "no supported layer was found that owns it"
Skip = str | Callable[[str], bool] | None


class CapturedCall(NamedTuple):
    """One call of a layer that is captured."""

    slot: int  # index of its slot among those of a replay
    occurrence: Occurrence
    call: Call


class Findings(NamedTuple):
    """What a trace says about each layer and parameter."""

    specs: dict[str, LayerSpec]
    covered: dict[str, list[CapturedCall]]
    uncovered: dict[str, str]  # parameter path -> reason
    orphans: list[str]  # layers whose kernel is not a leaf of argument 0, with the reason


class _LayerCalls(NamedTuple):
    """All calls of the layer at one path."""

    uses: list[CapturedCall]
    verdicts: list[LayerSpec | str]  # of each call
    leaves: set[int]  # the layer's parameters


def judge(trace: Trace, skip: Callable[[str], bool]) -> Findings:
    """Decides for each layer whether it is captured, and if not, why."""
    calls, orphans = _calls_by_layer(trace)

    # A layer is covered if all its calls are. `reasons`: leaf -> why not, "" if covered.
    specs: dict[str, LayerSpec] = {}
    covered: dict[str, list[CapturedCall]] = {}
    reasons: dict[int, str] = {}
    for path, layer in calls.items():
        verdict = _joint_verdict(path, layer, trace, skip)
        if isinstance(verdict, str):
            reasons.update(dict.fromkeys(layer.leaves, verdict))
        else:
            specs[path] = verdict
            covered[path] = layer.uses
            reasons.update(dict.fromkeys(layer.leaves, ""))
    for leaf, number in trace.usage.others.items():
        reasons.setdefault(leaf, trace.record.others[number])

    return Findings(specs, covered, _uncovered(trace, reasons, orphans), orphans)


def _calls_by_layer(trace: Trace) -> tuple[dict[str, _LayerCalls], list[str]]:
    """The calls of each layer by path, and the layers without a kernel in argument 0."""
    found: dict[str, _LayerCalls] = {}
    # If a call is differentiated, its markers may have vanished with their equations.
    seen = {occurrence.number for occurrence in trace.usage.occurrences}
    vanished = (trace.record.differentiated & trace.record.calls.keys()) - seen
    orphans = [f"{trace.record.calls[number].name}: {_DIFFERENTIATED}" for number in vanished]

    slots = itertools.count()
    for occurrence in trace.usage.occurrences:
        call = trace.record.calls[occurrence.number]
        verdict = _verdict(call, occurrence, trace)
        use = CapturedCall(-1 if occurrence.inside else next(slots), occurrence, call)
        marks = occurrence.marks
        kernel = marks["kernel"].leaf if "kernel" in marks else None
        if kernel is None:
            orphans.append(f"{call.name}: {verdict}")
            continue
        path = join_path(trace.paths[kernel.number][:-1])
        layer = found.setdefault(path, _LayerCalls([], [], set()))
        layer.uses.append(use)
        layer.verdicts.append(verdict)
        layer.leaves.update(m.leaf.number for m in marks.values() if m.leaf is not None)
    return found, orphans


def _uncovered(trace: Trace, reasons: dict[int, str], orphans: list[str]) -> dict[str, str]:
    """Parameter path -> reason, for each parameter that is not covered."""
    unknown = UNSEEN
    if orphans:
        unknown += f" (layers seen with other kernels: {'; '.join(sorted(set(orphans)))})"
    return {
        (name := join_path(path)): reasons.get(
            i, _AVERAGES if name.startswith("batch_stats/") else unknown
        )
        for i, path in enumerate(trace.paths)
        if reasons.get(i) != ""
    }


def _verdict(call: Call, occurrence: Occurrence, trace: Trace) -> LayerSpec | str:
    """The spec of one call, or why that call cannot be captured."""
    if hidden := _why_hidden(occurrence, trace):
        return hidden

    # Its kernel must be a leaf of argument 0, under the name that Flax gives it.
    kernel = occurrence.marks["kernel"]
    if kernel.leaf is None:
        return "its kernel is computed from argument 0 or comes from elsewhere"
    *_, name = trace.paths[kernel.leaf.number]
    spec = call.described
    if isinstance(spec, str):
        return spec
    if join_path((name,)) != spec.kernel_name:
        return f"its {spec.kernel_name} has a different name in argument 0"

    # Scans and vmaps that run over its parameters stack layers; other scans repeat one.
    stacks = _stacks_of_parameters(spec, occurrence, trace)
    if isinstance(stacks, str):
        return stacks
    kernel_stack, bias_stack = stacks
    scans = scans_of(occurrence)
    around = trace.usage.models.get(call.model, 0)
    if not all(over for _, over in scans[:around]):
        return "inside a scan around the whole model, which may run over the examples"
    repeats = [n for n, over in scans if not over]
    return replace(
        spec,
        stack=(*(n for n, over in scans if over), *kernel.vmapped),
        kernel_stack=kernel_stack,
        bias_stack=bias_stack,
        positions=spec.positions * int(np.prod(repeats, dtype=int)),
    )


def _why_hidden(occurrence: Occurrence, trace: Trace) -> str | None:
    """Why a call, or its batch axis, cannot be seen in the program; None if it can."""
    if occurrence.number in trace.record.differentiated:
        return _DIFFERENTIATED
    if occurrence.inside:
        return f"inside {occurrence.inside}, where layers cannot be captured"
    marks = occurrence.marks
    begin, kernel, end = (marks.get(key) for key in ("begin", "kernel", "end"))
    if begin is None or kernel is None or end is None:
        return "part of its call is missing from the program"
    if kernel.vmapped != end.vmapped:
        return "inside vmap: its batch axis is hidden; let the layer see the whole batch"
    if begin.vmapped not in ((), end.vmapped):
        return "inside several vmaps, not all of which map over its input"
    return None


def _stacks_of_parameters(
    spec: LayerSpec, occurrence: Occurrence, trace: Trace
) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
    """The stacked axes of kernel and bias, or why these do not go together."""
    kernel, bias = occurrence.marks["kernel"], occurrence.marks.get("bias")
    assert kernel.leaf is not None
    kernel_stack = _stack_axes(kernel.leaf, len(kernel.vmapped))
    if kernel_stack is None:
        return "its kernel is transposed"
    if not spec.use_bias:
        return kernel_stack, ()
    home = trace.paths[kernel.leaf.number][:-1]
    if bias is None or bias.leaf is None or trace.paths[bias.leaf.number][:-1] != home:
        return "its bias is not a leaf next to its kernel in argument 0"
    bias_stack = _stack_axes(bias.leaf, len(kernel.vmapped))
    same = [x is None for x in bias.leaf.scanned] == [x is None for x in kernel.leaf.scanned]
    if bias_stack is None or not same or bias.vmapped != kernel.vmapped:
        return "its bias is not stacked like its kernel"
    return kernel_stack, bias_stack


def _stack_axes(leaf: Leaf, vmapped: int) -> tuple[int, ...] | None:
    """Axes of a leaf that scans and vmaps run over; None if the other axes are permuted."""
    if list(leaf.axes[vmapped:]) != sorted(leaf.axes[vmapped:]):
        return None
    return (*(axis for axis in leaf.scanned if axis is not None), *leaf.axes[:vmapped])


def scans_of(occurrence: Occurrence) -> list[tuple[int, bool]]:
    """Length of each scan around a call, and whether it runs over the layer's parameters."""
    leaf = occurrence.marks["kernel"].leaf
    assert leaf is not None
    return [(n, axis is not None) for n, axis in zip(occurrence.scans, leaf.scanned, strict=True)]


def _joint_verdict(
    path: str, layer: _LayerCalls, trace: Trace, skip: Callable[[str], bool]
) -> LayerSpec | str:
    """The spec for all calls of the layer at `path`, or why it is not covered."""
    specs: list[LayerSpec] = []
    for verdict in layer.verdicts:
        if isinstance(verdict, str):
            return verdict
        specs.append(verdict)
    attended = any(spec.attended for spec in specs)
    specs = [replace(spec, attended=attended) for spec in specs]
    if len(set(specs)) > 1:
        return "tied: layers of different kinds share this parameter"
    if layer.leaves & trace.usage.entangled:
        return "tied: the loss also uses it outside this layer"
    if skip(path):
        return "skipped on request"
    positions = sum(spec.positions for spec in specs)
    return replace(specs[0], path=path, positions=positions)


def as_predicate(skip: Skip) -> Callable[[str], bool]:
    """Whether a layer's path is to be left out; raises unless `skip` can tell."""
    if skip is None:
        return lambda path: False
    if isinstance(skip, str):
        try:
            pattern = re.compile(skip)
        except (re.error, OverflowError) as error:
            raise ValueError(f"skip must be a regular expression, got {skip!r}: {error}") from error
        return lambda path: pattern.search(path) is not None
    if callable(skip):
        return skip
    raise ValueError(f"skip must be a regular expression or a predicate on the path, got {skip!r}")


def check_skip(skip: Skip, findings: Findings) -> None:
    """Raises for a regular expression that matches no layer."""
    paths = {*findings.specs, *(p.rpartition("/")[0] or "~" for p in findings.uncovered)}
    if isinstance(skip, str) and not any(map(as_predicate(skip), paths)):
        raise ValueError(f"skip={skip!r} matches none of the layers: {', '.join(sorted(paths))}")


def nothing_found(trace: Trace, findings: Findings) -> str:
    """The message if no layer is covered."""
    if not trace.paths:
        return (
            "argument 0 holds no arrays: pass the parameters as the first argument of the function"
        )
    if findings.orphans:
        return (
            "no layer can be captured: layers were called, but none has its kernel in argument 0 "
            "(the parameters must be the first argument of the function and reach the layers "
            "unchanged):\n  " + "\n  ".join(findings.orphans)
        )
    lines = "\n  ".join(f"{path}: {why}" for path, why in sorted(findings.uncovered.items()))
    return (
        "no layer can be captured: argument 0 has the parameters of no dense layer, convolution or "
        'embedding (nor, with norm="unitwise", of a normalisation) that is supported and not '
        f"skipped:\n  {lines}"
    )
