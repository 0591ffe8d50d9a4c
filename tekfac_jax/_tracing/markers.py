"""Markers around layer calls: Python leaves them in a trace, the jaxpr shows where they ended up.

Python sees the layers (their type, options and shapes) but not the program: a kernel inside
`nn.jit` or `nn.scan` is a new tracer, a tied kernel looks like any other. The jaxpr sees the
program but not the layers. A marker is an identity with a name, and so the link between the two.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

_NAME = re.compile(r"tekfac:(\d+):(\w+)((?::\d+)*)")

# Calls that only group equations; what happens inside happens outside.
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_vmap_call"})
_CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})


class Mark(NamedTuple):
    """One marker as it is found in a jaxpr.

    Attributes:
        call: number of the layer call.
        role: what is marked: ``"begin"`` (the input), ``"kernel"``, ``"bias"``, ``"end"`` (the
            output), a parameter of a layer that is not supported (with a prefix), or
            ``"model"`` (anything at the start of the outermost module call).
        vmapped: sizes of the axes that `vmap` added; they stand in front.
    """

    call: int
    role: str
    vmapped: tuple[int, ...]


def mark(value: Any, call: int, role: str, on_derivative: Callable[[], None]) -> Any:
    """`value`, marked. Computes nothing.

    The trace itself differentiates nothing, so `on_derivative` is called only for a `jax.grad`,
    `jax.vjp` or `jax.jvp` inside the traced function.
    """
    name = f"tekfac:{call}:{role}"

    @jax.custom_jvp
    def marked(value: Any) -> Any:
        return _named(name)(value)

    @marked.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        on_derivative()
        return checkpoint_name(primals[0], name), tangents[0]

    return marked(value)


def _named(name: str) -> Callable[[Any], Any]:
    """An identity that leaves `name`, and in front of the value's axes each axis of a `vmap`."""

    @custom_vmap
    def named(value: Any) -> Any:
        return checkpoint_name(value, name)

    @named.def_vmap
    def _(size: int, is_batched: Any, value: Any) -> tuple[Any, bool]:
        del is_batched  # there is one argument, and the rule is for when it is
        return _named(f"{name}:{size}")(value), True

    return named


def mark_of(eqn: Any) -> Mark | None:
    """The marker that an equation is."""
    if eqn.primitive.name != "name":
        return None
    match = _NAME.fullmatch(eqn.params["name"])
    if match is None:
        return None
    sizes = tuple(int(size) for size in match[3].split(":")[1:])
    return Mark(int(match[1]), match[2], sizes[::-1])  # the innermost vmap leaves its size first


class Body(NamedTuple):
    """The jaxpr of an equation whose inside can be followed.

    Attributes:
        kind: ``"call"``, ``"checkpoint"`` or ``"scan"``.
        jaxpr: what is inside.
        consts: its constants.
    """

    kind: str
    jaxpr: Any
    consts: Sequence[Any]


def body_of(eqn: Any) -> Body | None:
    """What is inside an equation, or None if it cannot be followed."""
    name = eqn.primitive.name
    if name in _CALLS:
        return Body("call", *open_jaxpr(eqn.params["call" if "call" in eqn.params else "jaxpr"]))
    if name in _CHECKPOINTS:
        return Body("checkpoint", *open_jaxpr(eqn.params["jaxpr"]))
    if name == "scan":
        return Body("scan", *open_jaxpr(eqn.params["jaxpr"]))
    if name == "custom_jvp_call":
        # Of a marker. One of the user's own has a derivative that a walk inside would lose.
        jaxpr, consts = open_jaxpr(eqn.params["call_jaxpr"])
        is_marker = any(marks_below(eqn)) and all(map(_only_marks, jaxpr.eqns))
        return Body("call", jaxpr, consts) if is_marker else None
    return None


def _only_marks(eqn: Any) -> bool:
    """Whether an equation is a marker, or what vmap needs around one."""
    name = eqn.primitive.name
    is_call = name == "custom_vmap_call" and any(marks_below(eqn))
    return mark_of(eqn) is not None or is_call or name == "transpose"


class ScanLayout(NamedTuple):
    """How the operands and results of a scan are divided: constants, carry, and what it runs over.

    Read off the ranks: outside, what it runs over has one axis more.
    """

    consts: int
    carry: int


def scan_layout(eqn: Any, body: Body) -> ScanLayout:
    """The layout of a scan's operands; its first `carry` results are the carry."""

    def is_split(outside: Any, inside: Any) -> bool:
        return len(outside.aval.shape) == len(inside.aval.shape) + 1

    xs = sum(map(is_split, eqn.invars, body.jaxpr.invars))
    ys = sum(map(is_split, eqn.outvars, body.jaxpr.outvars))
    carry = len(eqn.outvars) - ys
    return ScanLayout(len(eqn.invars) - carry - xs, carry)


def marks_below(eqn: Any) -> Iterator[Mark]:
    """All markers inside an equation, however deep."""
    for jaxpr in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(jaxpr):
            for inner in open_jaxpr(jaxpr)[0].eqns:
                found = mark_of(inner)
                if found:
                    yield found
                yield from marks_below(inner)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, whether it is closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")
