"""Runs a traced function once more, with a tag on the output of each layer call.

A tag is an identity whose custom derivative hands out a statistic as the "gradient" of an
otherwise unused zero slot: (a, u), the layer's input and the gradient with respect to its output,
or what is made of them. Slots enter scans as something more to run over, so that each iteration
fills its own.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from tekfac_jax._layers.statistics import Capture
from tekfac_jax._tracing.markers import Body, Mark, body_of, mark_of, marks_below, scan_layout

# Tags a layer's output: function of the output, the input and the slot.
Rule = Callable[[jax.Array, jax.Array, Any], jax.Array]


class Tag(NamedTuple):
    """What happens at one layer call: the slot is a pytree of arrays, the rule is not."""

    rule: Rule
    slot: Any


# For each occurrence of a layer call its tag, or None where nothing is captured.
Tags = Sequence[Tag | None]


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


def capture(y: jax.Array, x: jax.Array, slot: Capture) -> jax.Array:
    """The rule that hands out (a, u) as they are."""
    # Of a vmapped layer the input may be shared; the slot is not.
    a = jnp.broadcast_to(lax.stop_gradient(x.astype(slot.a.dtype)), slot.a.shape)
    return _tag(y, a, slot)


def replay(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], tags: Tags) -> list[Any]:
    """The outputs of a jaxpr, with the tags on its layer calls.

    Args:
        jaxpr: an open jaxpr with markers.
        consts: its constants.
        args: its arguments.
        tags: one for each occurrence of a layer call that `_usage` does not report as hidden, in
            the order of execution; slots inside scans with an axis for each of them in front.
    """
    return _walk(jaxpr, consts, args, _Progress(iter(tags), {}))


class _Progress(NamedTuple):
    waiting: Iterator[Tag | None]  # of the calls to come
    opened: dict[int, tuple[jax.Array, Tag | None]]  # call being run -> its input, its tag


def _walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], progress: _Progress) -> list[Any]:
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for run in _runs(jaxpr):
        outputs = run.call([read(atom) for atom in run.invars], progress)
        env.update(zip(run.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _meet(found: Mark, value: jax.Array, progress: _Progress) -> jax.Array:
    """What a marker does: begins a layer call, or ends it with the tag."""
    if found.role == "begin":
        progress.opened[found.call] = value, next(progress.waiting)
    elif found.role == "end" and found.call in progress.opened:
        x, tag = progress.opened.pop(found.call)
        return value if tag is None else tag.rule(value, x, tag.slot)
    return value


class _Run(NamedTuple):
    """Equations that are run together: several without markers, or one with."""

    invars: Sequence[Any]
    outvars: Sequence[Any]
    call: Callable[[list[Any], _Progress], Sequence[Any]]


def _runs(jaxpr: Any) -> Iterator[_Run]:
    """Divides the equations of a jaxpr; markers in something hidden stay where they are."""
    last_read = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    last_read |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    start = 0  # of the stretch without markers

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


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _plain_run(jaxpr: Any, eqns: list[Any], outvars: list[Any]) -> _Run:
    """A stretch of equations as a jaxpr of its own."""
    own = {v for eqn in eqns for v in eqn.outvars}
    read = dict.fromkeys(v for eqn in eqns for v in _variables(eqn.invars))
    invars = [v for v in read if v not in own]
    part = jaxpr.replace(constvars=[], invars=invars, outvars=outvars, eqns=eqns)
    function = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))
    return _Run(invars, outvars, lambda operands, progress: function(*operands))


def _call_of(eqn: Any, found: Mark | None, body: Body | None) -> Any:
    """Runs an equation that is a marker, or has markers inside."""

    def meet(operands: list[Any], progress: _Progress) -> Sequence[Any]:
        assert found is not None
        return [_meet(found, operands[0], progress)]

    def inside(operands: list[Any], progress: _Progress) -> Sequence[Any]:
        assert body is not None
        return _walk(body.jaxpr, body.consts, operands, progress)

    def checkpoint(operands: list[Any], progress: _Progress) -> Sequence[Any]:
        assert body is not None
        options = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
        slots, with_slots = _tags_inside(body, progress)

        jaxpr, consts = body.jaxpr, body.consts

        def function(operands: list[Any], slots: list[Any]) -> list[Any]:
            return replay(jaxpr, consts, operands, with_slots(slots))

        return jax.checkpoint(function, **options)(operands, slots)

    def scan(operands: list[Any], progress: _Progress) -> Sequence[Any]:
        assert body is not None
        return _scan(eqn, body, operands, *_tags_inside(body, progress))

    if body is None:
        return meet
    return {"call": inside, "checkpoint": checkpoint, "scan": scan}[body.kind]


def _tags_inside(
    body: Body, progress: _Progress
) -> tuple[list[Any], Callable[[list[Any]], list[Tag | None]]]:
    """The slots of the calls inside a body, and what makes tags of them again."""
    tags = list(itertools.islice(progress.waiting, _count_calls(body.jaxpr)))

    def with_slots(slots: list[Any]) -> list[Tag | None]:
        return [tag and tag._replace(slot=slot) for tag, slot in zip(tags, slots, strict=True)]

    return [tag and tag.slot for tag in tags], with_slots


def _count_calls(jaxpr: Any) -> int:
    """Layer calls that a replay of the jaxpr comes to."""
    count = 0
    for eqn in jaxpr.eqns:
        found, body = mark_of(eqn), body_of(eqn)
        count += found is not None and found.role == "begin"
        count += _count_calls(body.jaxpr) if body else 0
    return count


def _scan(
    eqn: Any,
    body: Body,
    operands: list[Any],
    slots: list[Any],
    with_slots: Callable[[list[Any]], list[Tag | None]],
) -> Sequence[Any]:
    layout = scan_layout(eqn, body)
    carried = layout.consts + layout.carry
    consts, carry, xs = (
        operands[: layout.consts], operands[layout.consts : carried], operands[carried:]
    )  # fmt: skip

    def step(carry: list[Any], split: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        xs, slots = split
        outputs = replay(body.jaxpr, body.consts, [*consts, *carry, *xs], with_slots(slots))
        return outputs[: layout.carry], outputs[layout.carry :]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, carry, (xs, slots), **options)
    return [*carry, *ys]
