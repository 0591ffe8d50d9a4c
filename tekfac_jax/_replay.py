"""Runs a traced function once more, with the tag on the output of each layer call.

The tag is an identity whose custom derivative hands out (a, u), the layer's input and the
gradient with respect to its output, as the "gradient" of an otherwise unused zero slot. Slots
enter scans as something more to run over, so that each iteration fills its own.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from tekfac_jax._layers import Capture
from tekfac_jax._marks import Body, Mark, body_of, mark_of, marks_below, scan_layout

# For each occurrence of a layer call its slot, or None where nothing is captured.
Slots = Sequence[Capture | None]


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


def replay(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], slots: Slots) -> list[Any]:
    """The outputs of a jaxpr, with a tag on each layer call that has a slot.

    Args:
        jaxpr: an open jaxpr with markers.
        consts: its constants.
        args: its arguments.
        slots: one for each occurrence of a layer call that `_usage` does not report as hidden,
            in the order of execution; inside scans with an axis for each of them in front.
    """
    return _walk(jaxpr, consts, args, _Progress(iter(slots), {}))


class _Progress(NamedTuple):
    waiting: Iterator[Capture | None]  # slots of the calls to come
    opened: dict[int, tuple[jax.Array, Capture | None]]  # call being run -> its input, its slot


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
        x, slot = progress.opened.pop(found.call)
        return value if slot is None else _tagged(value, x, slot)
    return value


def _tagged(y: jax.Array, x: jax.Array, slot: Capture) -> jax.Array:
    # Of a vmapped layer the input may be shared; the slot is not.
    a = jnp.broadcast_to(lax.stop_gradient(x.astype(slot.a.dtype)), slot.a.shape)
    return _tag(y, a, slot)


class _Run(NamedTuple):
    """Equations that are run together: several without markers, or one with."""

    invars: Sequence[Any]
    outvars: Sequence[Any]
    call: Callable[[list[Any], _Progress], Sequence[Any]]


def _runs(jaxpr: Any) -> Iterator[_Run]:
    """Divides the equations of a jaxpr; markers in something hidden stay where they are."""
    plain: list[Any] = []
    for eqn, needed in zip(jaxpr.eqns, _needed_after(jaxpr), strict=True):
        found, body = mark_of(eqn), body_of(eqn)
        if found is None and not (body and any(marks_below(eqn))):
            plain.append(eqn)
            continue
        if plain:
            yield _plain_run(jaxpr, plain, needed | set(_variables(eqn.invars)))
            plain = []
        yield _Run(eqn.invars, eqn.outvars, _call_of(eqn, found, body))
    if plain:
        yield _plain_run(jaxpr, plain, set(_variables(jaxpr.outvars)))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _needed_after(jaxpr: Any) -> list[set[Any]]:
    """For each equation the variables that are read after it."""
    needed = set(_variables(jaxpr.outvars))
    after = []
    for eqn in reversed(jaxpr.eqns):
        after.append(set(needed))
        needed |= set(_variables(eqn.invars))
    return after[::-1]


def _plain_run(jaxpr: Any, eqns: list[Any], needed: set[Any]) -> _Run:
    """A stretch of equations as a jaxpr of its own."""
    made = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, core.DropVar)]
    outvars = [v for v in made if v in needed]
    read = dict.fromkeys(v for eqn in eqns for v in _variables(eqn.invars))
    own = set(made)
    invars = [v for v in read if v not in own]
    stretch = jaxpr.replace(constvars=[], invars=invars, outvars=outvars, eqns=eqns)
    function = core.jaxpr_as_fun(core.ClosedJaxpr(stretch, ()))
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
        function = functools.partial(replay, body.jaxpr, body.consts)
        return jax.checkpoint(function, **options)(operands, _slots_inside(body, progress))

    def scan(operands: list[Any], progress: _Progress) -> Sequence[Any]:
        assert body is not None
        return _scan(eqn, body, operands, _slots_inside(body, progress))

    if body is None:
        return meet
    return {"call": inside, "checkpoint": checkpoint, "scan": scan}[body.kind]


def _slots_inside(body: Body, progress: _Progress) -> Slots:
    return list(itertools.islice(progress.waiting, _count_calls(body.jaxpr)))


def _count_calls(jaxpr: Any) -> int:
    """Layer calls that a replay of the jaxpr comes to."""
    count = 0
    for eqn in jaxpr.eqns:
        found, body = mark_of(eqn), body_of(eqn)
        count += found is not None and found.role == "begin"
        count += _count_calls(body.jaxpr) if body else 0
    return count


def _scan(eqn: Any, body: Body, operands: list[Any], slots: Slots) -> Sequence[Any]:
    layout = scan_layout(eqn, body)
    carried = layout.consts + layout.carry
    consts, carry, xs = (
        operands[: layout.consts], operands[layout.consts : carried], operands[carried:]
    )  # fmt: skip

    def step(carry: list[Any], split: tuple[list[Any], Slots]) -> tuple[list[Any], list[Any]]:
        xs, slots = split
        outputs = replay(body.jaxpr, body.consts, [*consts, *carry, *xs], slots)
        return outputs[: layout.carry], outputs[layout.carry :]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, carry, (xs, slots), **options)
    return [*carry, *ys]
