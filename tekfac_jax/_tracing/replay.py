"""Runs a traced function once more, with a tag on the output of each layer call.

A tag is an identity whose custom derivative returns a statistic as the "gradient" of an otherwise
unused zero slot: (a, u), the layer's input and the gradient with respect to its output, or sums
formed from them. A scan runs over the slots too, so that each iteration fills its own.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from tekfac_jax._layers.statistics import Capture
from tekfac_jax._layers.types import PyTree
from tekfac_jax._tracing.markers import (
    Atom,
    Body,
    Mark,
    body_of,
    mark_of,
    marks_below,
    scan_layout,
)

Slot: TypeAlias = PyTree  # zeros: a `Capture`, or sums and what the rule needs to form them
Rule: TypeAlias = Callable[[jax.Array, jax.Array, Slot], jax.Array]  # (y, x, slot) -> y, tagged


class Tag(NamedTuple):
    """What happens at one layer call: the slot is a pytree of arrays, the rule is not."""

    rule: Rule
    slot: Slot


# One tag for each occurrence of a layer call, or None where nothing is captured.
Tags: TypeAlias = Sequence[Tag | None]


@jax.custom_vjp
def _tag(y: jax.Array, a: jax.Array, slot: Capture) -> jax.Array:
    del a, slot  # the primal never reads the slot, so XLA removes it
    return y


def _tag_forward(y: jax.Array, a: jax.Array, slot: Capture) -> tuple[jax.Array, jax.Array]:
    del slot
    return y, a


def _tag_backward(a: jax.Array, u: jax.Array) -> tuple[jax.Array, None, Capture]:
    return u, None, Capture(a, u)


_tag.defvjp(_tag_forward, _tag_backward)


def capture_rule(y: jax.Array, x: jax.Array, slot: Capture) -> jax.Array:
    """The rule that returns (a, u) as they are."""
    # The members of a vmapped layer may share their input, but each has its own slot.
    a = jnp.broadcast_to(lax.stop_gradient(x.astype(slot.a.dtype)), slot.a.shape)
    return _tag(y, a, slot)


def replay(
    jaxpr: core.Jaxpr, consts: Sequence[jax.Array], args: Sequence[jax.Array], tags: Tags
) -> list[jax.Array]:
    """The outputs of a jaxpr, with the tags on its layer calls.

    Args:
        jaxpr: an open jaxpr with markers.
        consts: its constants.
        args: its arguments.
        tags: one for each occurrence of a layer call that `read_usage` does not report as hidden,
            in the order of execution. Slots have one leading axis for each scan around the call.
    """
    return _walk(jaxpr, consts, args, _Progress(iter(tags), {}))


class _Progress(NamedTuple):
    """How far a replay has come."""

    waiting: Iterator[Tag | None]  # tags of the calls to come
    opened: dict[int, tuple[jax.Array, Tag | None]]  # call being run -> its input, its tag


def _walk(
    jaxpr: core.Jaxpr,
    consts: Sequence[jax.Array],
    args: Sequence[jax.Array],
    progress: _Progress,
) -> list[jax.Array]:
    env: dict[Atom, jax.Array] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Atom) -> jax.Array:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for run in _runs(jaxpr):
        outputs = run.call([read(atom) for atom in run.invars], progress)
        env.update(zip(run.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run_marker(found: Mark, value: jax.Array, progress: _Progress) -> jax.Array:
    """Begins a layer call, or ends it with its tag."""
    if found.role == "begin":
        progress.opened[found.call] = value, next(progress.waiting)
    elif found.role == "end" and found.call in progress.opened:
        x, tag = progress.opened.pop(found.call)
        return value if tag is None else tag.rule(value, x, tag.slot)
    return value


# (operands, progress) -> results.
_Runner: TypeAlias = Callable[[list[jax.Array], _Progress], Sequence[jax.Array]]


class _Run(NamedTuple):
    """Equations that run together: several without markers, or one with markers."""

    invars: Sequence[Atom]
    outvars: Sequence[core.Var]
    call: _Runner


def _runs(jaxpr: core.Jaxpr) -> Iterator[_Run]:
    """Divides the equations of a jaxpr. Markers inside hidden calls have no effect."""
    last_read = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    last_read |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    start = 0  # first equation of the current stretch without markers

    def stretch(end: int) -> Iterator[_Run]:
        if start < end:
            eqns = jaxpr.eqns[start:end]
            made = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, core.DropVar)]
            yield _plain_run(jaxpr, eqns, [v for v in made if last_read.get(v, -1) >= end])

    for i, eqn in enumerate(jaxpr.eqns):
        found, body = mark_of(eqn), body_of(eqn)
        if found or (body and any(marks_below(eqn))):
            yield from stretch(i)
            yield _Run(eqn.invars, eqn.outvars, _call_of(eqn, found, body))
            start = i + 1
    yield from stretch(len(jaxpr.eqns))


def _variables(atoms: Sequence[Atom]) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _plain_run(jaxpr: core.Jaxpr, eqns: list[core.JaxprEqn], outvars: list[core.Var]) -> _Run:
    """A stretch of equations as a jaxpr of its own."""
    own = {v for eqn in eqns for v in eqn.outvars}
    read = dict.fromkeys(v for eqn in eqns for v in _variables(eqn.invars))
    invars = [v for v in read if v not in own]
    part = jaxpr.replace(constvars=[], invars=invars, outvars=outvars, eqns=eqns)
    function = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))
    return _Run(invars, outvars, lambda operands, progress: function(*operands))


def _call_of(eqn: core.JaxprEqn, found: Mark | None, body: Body | None) -> _Runner:
    """Runs an equation that is a marker, or has markers inside."""
    if body is None:
        assert found is not None
        return lambda operands, progress: [_run_marker(found, operands[0], progress)]

    def call(operands: list[jax.Array], progress: _Progress) -> Sequence[jax.Array]:
        return _walk(body.jaxpr, body.consts, operands, progress)

    def checkpoint(operands: list[jax.Array], progress: _Progress) -> Sequence[jax.Array]:
        options = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
        slots, with_slots = _tags_inside(body, progress)

        def function(operands: list[jax.Array], slots: list[Slot]) -> list[jax.Array]:
            return replay(body.jaxpr, body.consts, operands, with_slots(slots))

        return jax.checkpoint(function, **options)(operands, slots)

    def scan(operands: list[jax.Array], progress: _Progress) -> Sequence[jax.Array]:
        return _scan(eqn, body, operands, *_tags_inside(body, progress))

    return {"call": call, "checkpoint": checkpoint, "scan": scan}[body.kind]


def _tags_inside(
    body: Body, progress: _Progress
) -> tuple[list[Slot], Callable[[list[Slot]], list[Tag | None]]]:
    """The slots of the calls inside a body, and a function from such slots back to tags."""
    tags = list(itertools.islice(progress.waiting, _count_calls(body.jaxpr)))

    def with_slots(slots: list[Slot]) -> list[Tag | None]:
        return [tag and tag._replace(slot=slot) for tag, slot in zip(tags, slots, strict=True)]

    return [tag and tag.slot for tag in tags], with_slots


def _count_calls(jaxpr: core.Jaxpr) -> int:
    """The number of layer calls that a replay of the jaxpr reaches."""
    count = 0
    for eqn in jaxpr.eqns:
        found, body = mark_of(eqn), body_of(eqn)
        count += found is not None and found.role == "begin"
        count += _count_calls(body.jaxpr) if body else 0
    return count


def _scan(
    eqn: core.JaxprEqn,
    body: Body,
    operands: list[jax.Array],
    slots: list[Slot],
    with_slots: Callable[[list[Slot]], list[Tag | None]],
) -> Sequence[jax.Array]:
    """Runs a scan over its own arrays and over the slots of the calls inside."""
    layout = scan_layout(eqn, body)
    carried = layout.consts + layout.carry
    consts, carry, xs = (
        operands[: layout.consts], operands[layout.consts : carried], operands[carried:]
    )  # fmt: skip

    def step(
        carry: list[jax.Array], split: tuple[list[jax.Array], list[Slot]]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        xs, slots = split
        outputs = replay(body.jaxpr, body.consts, [*consts, *carry, *xs], with_slots(slots))
        return outputs[: layout.carry], outputs[layout.carry :]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, carry, (xs, slots), **options)
    return [*carry, *ys]
