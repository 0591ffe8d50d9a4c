"""Which of the layers that a trace shows are captured, and why the others are not."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tekfac_jax._layers.paths import join_path
from tekfac_jax._layers.spec import LayerSpec, replace
from tekfac_jax._tracing.parameter_usage import Leaf, Occurrence
from tekfac_jax._tracing.recorder import Call
from tekfac_jax._tracing.trace import Trace

_AVERAGES = "no parameter: pass variables['params'] alone as argument 0"
UNSEEN = "no supported layer was seen to use it as its own"
Skip = str | Callable[[str], bool] | None


class CapturedCall(NamedTuple):
    """One call of a layer that is captured."""

    slot: int  # which of the slots of a replay is its
    occurrence: Occurrence
    call: Call


class Findings(NamedTuple):
    specs: dict[str, LayerSpec]
    covered: dict[str, list[CapturedCall]]
    uncovered: dict[str, str]  # parameter path -> reason
    homeless: list[str]  # layers whose kernel is no leaf of argument 0


def judge(trace: Trace, skip: Callable[[str], bool]) -> Findings:
    """Decides for each layer whether it is captured, and why not."""
    found: dict[str, list[tuple[CapturedCall, LayerSpec | str]]] = {}
    leaves: dict[str, set[int]] = {}
    reasons: dict[int, str] = {}
    seen = {occurrence.number for occurrence in trace.usage.occurrences}
    # The markers of a call that is differentiated may have vanished with their equations.
    vanished = (trace.record.differentiated & trace.record.calls.keys()) - seen
    homeless = [f"{trace.record.calls[number].name}: {_DIFFERENTIATED}" for number in vanished]
    slots = itertools.count()
    for occurrence in trace.usage.occurrences:
        call = trace.record.calls[occurrence.number]
        verdict = _verdict(call, occurrence, trace)
        use = CapturedCall(-1 if occurrence.inside else next(slots), occurrence, call)
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
    covered: dict[str, list[CapturedCall]] = {}
    for path, uses in found.items():
        verdict = _joint_verdict(path, [v for _, v in uses], leaves[path], trace, skip)
        if isinstance(verdict, str):
            reasons.update(dict.fromkeys(leaves[path], verdict))
        else:
            specs[path] = verdict
            covered[path] = [use for use, _ in uses]
            reasons.update(dict.fromkeys(leaves[path], ""))
    for leaf, number in trace.usage.others.items():
        reasons.setdefault(leaf, trace.record.others[number])
    unknown = UNSEEN
    if homeless:
        unknown += f" (seen with other kernels: {'; '.join(sorted(set(homeless)))})"
    uncovered = {
        (name := join_path(path)): reasons.get(
            i, _AVERAGES if name.startswith("batch_stats/") else unknown
        )
        for i, path in enumerate(trace.paths)
        if reasons.get(i) != ""
    }
    return Findings(specs, covered, uncovered, homeless)


_DIFFERENTIATED = "differentiated inside the function itself (by jax.grad, vjp, jvp, linearize)"


def _verdict(call: Call, occurrence: Occurrence, trace: Trace) -> LayerSpec | str:
    """The spec of one call, or why that call cannot be captured."""
    if occurrence.number in trace.record.differentiated:
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
        return f"its {spec.kernel_name} has another name in argument 0"
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
    if not all(over for _, over in scans_of(occurrence)[:around]):
        return "inside a scan around the whole model, whose axis may be that of the examples"
    stack = (*(n for n, over in scans_of(occurrence) if over), *vmapped)
    repeats = [n for n, over in scans_of(occurrence) if not over]
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


def scans_of(occurrence: Occurrence) -> list[tuple[int, bool]]:
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
    attended = any(spec.attended for spec in specs)
    specs = [replace(spec, attended=attended) for spec in specs]
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
        try:
            pattern = re.compile(skip)
        except (re.error, OverflowError) as error:
            raise ValueError(
                f"skip must be a regular expression, which {skip!r} is not: {error}"
            ) from error
        return lambda path: pattern.search(path) is not None
    if callable(skip):
        return skip
    raise ValueError(f"skip must be a regular expression or a predicate on the path, got {skip!r}")


def check_skip(skip: Skip, findings: Findings) -> None:
    """Raises for a regular expression that leaves nothing out."""
    paths = {*findings.specs, *(p.rpartition("/")[0] or "~" for p in findings.uncovered)}
    if isinstance(skip, str) and not any(map(as_predicate(skip), paths)):
        raise ValueError(f"skip={skip!r} matches none of the layers: {', '.join(sorted(paths))}")


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
        "no layer can be captured: among the parameters of argument 0 there is no dense layer, "
        'convolution or embedding (nor, with norm="unitwise", a normalisation) that is supported '
        f"and not skipped:\n  {lines}"
    )
