"""The plan of one traced function: which of its layer calls fills which slot."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from tekfac_jax._capture.coverage import UNSEEN, CapturedCall, Findings, judge, scans_of
from tekfac_jax._layers.paths import parameter_path
from tekfac_jax._layers.spec import Layers, LayerSpec, zeros_like
from tekfac_jax._layers.statistics import Capture
from tekfac_jax._layers.types import Params, PyTree
from tekfac_jax._tracing.parameter_usage import Occurrence
from tekfac_jax._tracing.replay import Tag, capture_rule
from tekfac_jax._tracing.trace import Trace, trace_layers

Captures: TypeAlias = dict[str, tuple[Capture, ...]]


class Plan(NamedTuple):
    """A traced function, and which of its layer calls fills which slot."""

    trace: Trace
    uses: dict[str, list[CapturedCall]]
    batch_size: int

    def slots(self) -> Captures:
        """Zeros in the shapes of the captures: [*stack, N, *repeats, ...]."""

        def slot(use: CapturedCall) -> Capture:
            lead = (*use.occurrence.scans, *use.occurrence.marks["end"].vmapped)
            axes = _repeated_axes(use.occurrence)

            def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
                stacked = jnp.broadcast_to(zeros_like(shape), (*lead, *shape.shape))
                return jnp.moveaxis(stacked, *axes)

            return Capture(zeros(use.call.input), zeros(use.call.output))

        return {path: tuple(map(slot, uses)) for path, uses in self.uses.items()}

    def run(self, params: Params, slots: Captures) -> PyTree:
        """The function's output, with every layer call captured."""
        tags = {path: self.capture_tags(path, slots[path]) for path in self.uses}
        return self.run_with(params, tags)

    def capture_tags(self, path: str, slots: Sequence[Capture]) -> list[Tag]:
        """The tags that capture all calls of one layer."""

        def tag(use: CapturedCall, slot: Capture) -> Tag:
            to, source = _repeated_axes(use.occurrence)
            return Tag(capture_rule, Capture(*(jnp.moveaxis(x, source, to) for x in slot)))

        return list(map(tag, self.uses[path], slots))

    def run_with(self, params: Params, tags: Mapping[str, Sequence[Tag]]) -> PyTree:
        """The function's output, with these tags on the calls of each layer."""
        in_order: list[Tag | None] = [None for o in self.trace.usage.occurrences if not o.inside]
        for path, uses in self.uses.items():
            for use, tag in zip(uses, tags[path], strict=True):
                in_order[use.slot] = tag
        return self.trace.run(params, in_order)

    def call_of(self, path: str) -> CapturedCall | None:
        """The only call of a layer; None if there are several calls or a scan repeats it."""
        use, *more = self.uses[path]
        repeated, _ = _repeated_axes(use.occurrence)
        return None if more or repeated else use


def _repeated_axes(occurrence: Occurrence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the scans that repeat a layer: where the program puts them, and where a capture does.

    Repetitions count as further positions, so in a capture they follow the batch axis.
    """
    scans = scans_of(occurrence)
    repeated = tuple(i for i, (_, over) in enumerate(scans) if not over)
    batch = len(scans) - len(repeated) + len(occurrence.marks["end"].vmapped)
    return repeated, tuple(range(batch + 1, batch + 1 + len(repeated)))


def batch_plan(
    fn: Callable[..., PyTree],
    layers: Layers,
    params: Params,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> Plan:
    """Traces `fn` for these arguments and compares what it finds with `layers`."""
    norms = any(spec.kind == "norm" for spec in layers.values())
    trace = trace_layers(fn, params, args, kwargs, norms=norms)
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
                f"layer {path!r} has changed since find_layers: {_changes(spec, found)}. "
                "Call find_layers again."
            )
    _check_nothing_new(findings, layers)
    covered = {path: findings.covered[path] for path in layers}
    return Plan(trace, covered, common_batch_size(covered))


def _changes(old: LayerSpec, new: LayerSpec) -> str:
    """The fields that differ, in words."""
    names = [field.name for field in dataclasses.fields(old) if field.compare]
    both = ((name, getattr(old, name), getattr(new, name)) for name in names)
    return ", ".join(f"{name} was {was!r} and is {now!r}" for name, was, now in both if was != now)


def _check_nothing_new(findings: Findings, layers: Layers) -> None:
    """Raises for parameters and layer calls that `find_layers` did not see."""
    reasons = dict(layers.uncovered)
    unknown = findings.uncovered.keys() - reasons.keys()
    unknown |= {
        parameter_path(path, spec.kernel_name)
        for path, spec in findings.specs.items()
        if path not in layers and parameter_path(path, spec.kernel_name) not in reasons
    }
    # A hand-made `Layers` has no batch size and need not list the other parameters.
    if unknown and layers.batch_size is not None:
        raise ValueError(
            "argument 0 has parameters that find_layers did not see: "
            f"{', '.join(sorted(unknown))}. Call find_layers again."
        )
    for path, spec in findings.specs.items():
        reason = reasons.get(parameter_path(path, spec.kernel_name), "")
        if path not in layers and reason.startswith(UNSEEN):
            raise ValueError(
                f"layer {path!r} is called here, but was not called when find_layers ran: call "
                "find_layers with the function and arguments that are used here (pass skip= to "
                "keep the layer uncovered)"
            )


def common_batch_size(covered: Mapping[str, list[CapturedCall]]) -> int:
    """The leading axis of the layers' inputs; raises if they disagree."""
    sizes = {(path, use.call.input.shape[0]) for path, uses in covered.items() for use in uses}
    if len({size for _, size in sizes}) > 1:
        listed = ", ".join(f"{path}: {size}" for path, size in sorted(sizes))
        raise ValueError(
            f"layers disagree on the batch size, the leading axis of their inputs ({listed}). "
            "Keep the batch as the leading axis, or leave out the layers that differ with "
            "find_layers(..., skip=...)."
        )
    _, size = next(iter(sizes))
    if size == 0:
        raise ValueError("the batch is empty: the leading axis of the layers' inputs is 0")
    return size
