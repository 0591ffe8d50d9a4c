"""How a traced function uses the leaves of its first argument.

A capture is exact only if the layer that was seen really owns its kernel: it must *be* a leaf
of argument 0, and nothing else may use that leaf together with the data. Python sees neither
(a kernel inside `nn.jit` is a new tracer, a tied kernel looks like any other), the jaxpr sees
both. So the interceptor leaves named markers in an abstract trace, and this module reads them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

_MARKER = re.compile(r"tekfac:(\d+):(\w+)")
# Calls that only group equations; what happens inside happens outside.
_CALLS = frozenset({"jit", "pjit", "checkpoint", "remat", "remat2", "closed_call", "core_call"})
# One operand in, the same numbers out.
_COPIES = frozenset(
    {"name", "convert_element_type", "copy", "copy_p", "sharding_constraint", "pvary", "pcast"}
)  # fmt: skip
# Linear in all operands together: a sum of a data term and a penalty term stays one.
_LINEAR = _COPIES | frozenset(
    {"add", "sub", "add_any", "neg", "reshape", "squeeze", "expand_dims", "broadcast_in_dim",
     "reduce_sum", "psum", "psum2", "psum_invariant", "concatenate", "slice", "transpose"}
)  # fmt: skip


class Marked(NamedTuple):
    """Where one marked value was found.

    Attributes:
        leaf: index of the leaf of argument 0 that the value is (up to its dtype), or None.
        ndim: rank in the jaxpr; larger than the rank that Python saw under `jax.vmap`.
        inside: the primitive that hides it (``"scan"``, ...), or None at the top level.
        cached: whether a traced-once call (`jax.jit`, `jax.checkpoint`) surrounds it.
    """

    leaf: int | None
    ndim: int
    inside: str | None
    cached: bool


class Usage(NamedTuple):
    """What `read_usage` finds.

    Attributes:
        marked: (call number, role) -> where it is.
        entangled: leaves that meet the data elsewhere than in the layer that owns them.
        repeated: numbers of calls that stand more than once in the program.
    """

    marked: dict[tuple[int, str], Marked]
    entangled: frozenset[int]
    repeated: frozenset[int]


class _Value(NamedTuple):
    leaf: int | None = None
    reads: frozenset[int] = frozenset()  # leaves read outside their layer
    data: bool = False  # depends on the data


def mark(value: Any, call: int, role: str) -> None:
    """Leaves a named marker for `value` in the trace; computes nothing."""
    checkpoint_name(value, f"tekfac:{call}:{role}")


def read_usage(jaxpr: core.ClosedJaxpr, num_leaves: int) -> Usage:
    """Reads the markers of a jaxpr whose first `num_leaves` inputs are argument 0's leaves.

    A leaf that is only penalised (an L2 term added to the loss) is not entangled: its penalty
    never meets the data except in a sum.
    """
    reader = _Reader()
    body = jaxpr.jaxpr
    # A scalar is a coefficient (a loss scale, a penalty weight); data has a batch axis.
    inputs = [
        _Value(leaf=i) if i < num_leaves else _Value(data=bool(v.aval.shape))
        for i, v in enumerate(body.invars)
    ]
    constants = [_Value(data=bool(v.aval.shape)) for v in body.constvars]
    reader.walk(body, constants, inputs)
    return Usage(reader.marked, frozenset(reader.entangled), frozenset(reader.repeated))


class _Reader:
    """One pass over a jaxpr, in execution order."""

    def __init__(self) -> None:
        self.marked: dict[tuple[int, str], Marked] = {}
        self.entangled: set[int] = set()
        self.repeated: set[int] = set()
        self.open: dict[int, set[int]] = {}  # layer calls being executed -> leaves they own
        self.depth = 0  # surrounding calls

    def walk(
        self, jaxpr: Any, constants: Sequence[_Value], inputs: Sequence[_Value]
    ) -> list[_Value]:
        env = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return _Value() if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, operands: list[_Value]) -> list[_Value]:
        marker = _marker(eqn)
        if marker:
            ndim = eqn.invars[0].aval.ndim
            self.meet(marker, Marked(operands[0].leaf, ndim, None, self.depth > 0))
            return operands
        if eqn.primitive.name == "optimization_barrier":
            return operands
        if eqn.primitive.name in _CALLS:
            body, consts = _open_jaxpr(eqn.params["jaxpr"])
            constants = [_Value(data=bool(getattr(c, "shape", ()))) for c in consts]
            self.depth += 1
            outputs = self.walk(body, constants, operands)
            self.depth -= 1
            return outputs
        for hidden, var in _markers_below(eqn):
            self.meet(hidden, Marked(None, var.aval.ndim, eqn.primitive.name, True))
        return [self.combine(eqn, operands)] * len(eqn.outvars)

    def meet(self, marker: tuple[int, str], found: Marked) -> None:
        call, role = marker
        if role == "begin" and marker in self.marked:
            self.repeated.add(call)
        self.marked[marker] = found
        if role == "end":
            self.open.pop(call, None)
        elif found.inside is None and role in ("begin", "kernel", "bias"):
            owned = self.open.setdefault(call, set())
            if role != "begin" and found.leaf is not None:
                owned.add(found.leaf)

    def combine(self, eqn: Any, operands: list[_Value]) -> _Value:
        name = eqn.primitive.name
        owned: set[int | None] = {None}.union(*self.open.values())
        if name in _COPIES and len(operands) == 1 and operands[0].leaf is not None:
            if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):  # rounding is no copy
                return operands[0]
        foreign = [v.reads if v.leaf in owned else v.reads | {v.leaf} for v in operands]
        reads: frozenset[Any] = frozenset().union(*foreign)
        data = any(v.data for v in operands) or bool(self.open)
        if reads and data:
            tainted = [bool(r) or v.data for r, v in zip(foreign, operands, strict=True)]
            scaled = (
                name in ("mul", "div") and sum(tainted) == 1 and not (name == "div" and tainted[1])
            )
            if self.open or not (name in _LINEAR or scaled):
                self.entangled |= reads
                reads = frozenset()
        return _Value(reads=reads, data=data)


def _marker(eqn: Any) -> tuple[int, str] | None:
    if eqn.primitive.name != "name":
        return None
    match = _MARKER.fullmatch(eqn.params["name"])
    return (int(match[1]), match[2]) if match else None


def _markers_below(eqn: Any) -> Iterable[tuple[tuple[int, str], Any]]:
    """Markers in the jaxprs of an equation that is not walked into."""
    for jaxpr in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(jaxpr):
            for inner in _open_jaxpr(jaxpr)[0].eqns:
                marker = _marker(inner)
                if marker:
                    yield marker, inner.invars[0]
                yield from _markers_below(inner)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    if hasattr(jaxpr, "consts"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()
