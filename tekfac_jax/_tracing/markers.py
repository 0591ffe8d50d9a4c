"""Markers around layer calls: the link between the layers and the traced program.

Python sees the layers (their type, options and shapes) but not the program: a kernel inside
`nn.jit` or `nn.scan` is a new tracer, and a tied kernel looks like any other. The jaxpr shows the
program but not the layers. A marker is a named identity: Python places it during the trace, and the
jaxpr shows where it ended up.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeGuard

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.extend import core

Atom: TypeAlias = core.Var | core.Literal

_NAME = re.compile(r"tekfac:(\d+):(\w+)((?::\d+)*)")

# Calls that only group equations: their body can be read as if it stood outside.
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_vmap_call"})
_CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})


class Mark(NamedTuple):
    """One marker, as found in a jaxpr.

    Attributes:
        call: number of the layer call.
        role: what is marked: ``"begin"`` (the input), ``"kernel"``, ``"bias"``, ``"end"`` (the
            output), a parameter of an unsupported layer (with a prefix), or ``"model"`` (any array
            at the start of the outermost module call).
        vmapped: sizes of the leading axes that `vmap` added.
    """

    call: int
    role: str
    vmapped: tuple[int, ...]


def mark(value: jax.Array, call: int, role: str, on_derivative: Callable[[], None]) -> jax.Array:
    """`value`, marked. Computes nothing.

    The trace itself differentiates nothing, so `on_derivative` is called only for a `jax.grad`,
    `jax.vjp` or `jax.jvp` inside the traced function.
    """
    name = f"tekfac:{call}:{role}"

    @jax.custom_jvp
    def marked(value: jax.Array) -> jax.Array:
        return _named(name)(value)

    @marked.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        on_derivative()
        return checkpoint_name(primals[0], name), tangents[0]

    return marked(value)


def _named(name: str) -> Callable[[jax.Array], jax.Array]:
    """An identity named `name`; each `vmap` around it appends the size of its axis."""

    @custom_vmap
    def named(value: jax.Array) -> jax.Array:
        return checkpoint_name(value, name)

    @named.def_vmap
    def _(size: int, is_batched: Sequence[bool], value: jax.Array) -> tuple[jax.Array, bool]:
        del is_batched  # the rule runs only if the one argument is batched
        return _named(f"{name}:{size}")(value), True

    return named


def mark_of(eqn: core.JaxprEqn) -> Mark | None:
    """The marker that an equation is, or None."""
    if eqn.primitive.name != "name":
        return None
    match = _NAME.fullmatch(eqn.params["name"])
    if match is None:
        return None
    sizes = tuple(int(size) for size in match[3].split(":")[1:])
    return Mark(int(match[1]), match[2], sizes[::-1])  # the innermost vmap writes its size first


class Body(NamedTuple):
    """The jaxpr inside an equation that can be followed.

    Attributes:
        kind: ``"call"``, ``"checkpoint"`` or ``"scan"``.
        jaxpr: the jaxpr inside.
        consts: its constants.
    """

    kind: str
    jaxpr: core.Jaxpr
    consts: Sequence[jax.Array]


def body_of(eqn: core.JaxprEqn) -> Body | None:
    """The body of an equation, or None if it has none that can be followed."""
    name = eqn.primitive.name
    if name in _CALLS:
        return Body("call", *open_jaxpr(eqn.params["call" if "call" in eqn.params else "jaxpr"]))
    if name in _CHECKPOINTS:
        return Body("checkpoint", *open_jaxpr(eqn.params["jaxpr"]))
    if name == "scan":
        return Body("scan", *open_jaxpr(eqn.params["jaxpr"]))
    if name == "custom_jvp_call":
        # Only a marker's own. Following a user's custom_jvp would lose its derivative.
        jaxpr, consts = open_jaxpr(eqn.params["call_jaxpr"])
        is_marker = any(marks_below(eqn)) and all(map(_only_marks, jaxpr.eqns))
        return Body("call", jaxpr, consts) if is_marker else None
    return None


def _only_marks(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a marker, or one that `vmap` adds around a marker."""
    name = eqn.primitive.name
    is_call = name == "custom_vmap_call" and any(marks_below(eqn))
    return mark_of(eqn) is not None or is_call or name == "transpose"


class ScanLayout(NamedTuple):
    """How the operands of a scan divide into constants, carry, and the arrays it runs over.

    Attributes:
        consts: number of constants, which come first.
        carry: number of carried values, which come next.
    """

    consts: int
    carry: int


def scan_layout(eqn: core.JaxprEqn, body: Body) -> ScanLayout:
    """The layout of a scan's operands; its first `carry` results are the carry.

    It follows from the ranks: an array that the scan runs over has one axis more outside.
    """

    def is_split(outside: Atom, inside: Atom) -> bool:
        return len(shape_of(outside)) == len(shape_of(inside)) + 1

    xs = sum(map(is_split, eqn.invars, body.jaxpr.invars))
    ys = sum(map(is_split, eqn.outvars, body.jaxpr.outvars))
    carry = len(eqn.outvars) - ys
    return ScanLayout(len(eqn.invars) - carry - xs, carry)


def marks_below(eqn: core.JaxprEqn) -> Iterator[Mark]:
    """All markers inside an equation, at any depth."""
    for jaxpr in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(jaxpr):
            for inner in open_jaxpr(jaxpr)[0].eqns:
                found = mark_of(inner)
                if found:
                    yield found
                yield from marks_below(inner)


def open_jaxpr(
    jaxpr: core.Jaxpr | core.ClosedJaxpr,
) -> tuple[core.Jaxpr, Sequence[jax.Array]]:
    """A jaxpr, closed or open, as an open one and its constants."""
    if is_closed(jaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    assert is_open(jaxpr)
    return jaxpr, ()


def is_closed(value: object) -> TypeGuard[core.ClosedJaxpr]:
    """Whether a parameter of an equation is a jaxpr with its constants."""
    return hasattr(value, "consts")


def is_open(value: object) -> TypeGuard[core.Jaxpr]:
    """Whether a parameter of an equation is a jaxpr without constants."""
    return hasattr(value, "eqns") and not is_closed(value)


def _is_jaxpr(value: object) -> TypeGuard[core.Jaxpr | core.ClosedJaxpr]:
    return hasattr(value, "eqns")


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of a value in a jaxpr."""
    return getattr(atom.aval, "shape", ())
