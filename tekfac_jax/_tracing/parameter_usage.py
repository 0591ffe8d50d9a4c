"""How a traced function uses the leaves of its first argument.

A capture is exact only if the layer owns its kernel: the kernel must *be* a leaf of argument 0 (or
the slice of one that a scan or vmap takes), and nothing else may combine that leaf with the data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core

from tekfac_jax._tracing.markers import (
    Atom,
    Body,
    Mark,
    body_of,
    mark_of,
    marks_below,
    scan_layout,
    shape_of,
)

# One operand in, the same numbers out.
_COPIES = frozenset(
    {"name", "convert_element_type", "copy", "copy_p", "sharding_constraint", "pvary", "pcast"}
)  # fmt: skip

# Linear in all operands jointly: the sum of a data term and a penalty term remains such a sum.
_LINEAR = _COPIES | frozenset(
    {"add", "sub", "add_any", "neg", "reshape", "squeeze", "expand_dims", "broadcast_in_dim",
     "reduce_sum", "psum", "psum2", "psum_invariant", "concatenate", "slice", "transpose"}
)  # fmt: skip


class Leaf(NamedTuple):
    """A leaf of argument 0, as one value in the program shows it.

    Attributes:
        number: index of the leaf.
        axes: for each axis of the value, the axis of the leaf.
        scanned: for each surrounding scan, the axis of the leaf that it runs over, or None.
    """

    number: int
    axes: tuple[int, ...]
    scanned: tuple[int | None, ...] = ()


class Marked(NamedTuple):
    """One marked value.

    Attributes:
        leaf: the leaf of argument 0 that the value is (up to its dtype), or None.
        vmapped: sizes of the leading axes that `vmap` added.
    """

    leaf: Leaf | None
    vmapped: tuple[int, ...]


class Occurrence(NamedTuple):
    """One call of a layer in the program. A call that was traced once may occur several times.

    Attributes:
        number: number of the call that Python saw.
        marks: the marked values of the call, by role.
        scans: lengths of the surrounding scans, outermost first.
        inside: the primitive that hides the call (``"while"``, ...), or None.
    """

    number: int
    marks: dict[str, Marked]
    scans: tuple[int, ...]
    inside: str | None


class Usage(NamedTuple):
    """What `read_usage` finds.

    Attributes:
        occurrences: calls of layers, in the order of execution.
        models: number of the outermost module call -> number of scans around it.
        others: leaf -> number of the unsupported module's call that it belongs to.
        entangled: leaves that meet the data outside the layer that owns them.
    """

    occurrences: list[Occurrence]
    models: dict[int, int]
    others: dict[int, int]
    entangled: frozenset[int]


class _Value(NamedTuple):
    """Where a value in the program comes from."""

    leaf: Leaf | None = None  # the leaf that it is
    reads: frozenset[int] = frozenset()  # the leaves that it depends on outside their layer
    data: bool = False  # whether it depends on the data

    def all_reads(self) -> frozenset[int]:
        return self.reads if self.leaf is None else self.reads | {self.leaf.number}


def read_usage(jaxpr: core.ClosedJaxpr, num_leaves: int) -> Usage:
    """Reads the markers of a jaxpr whose first `num_leaves` inputs are argument 0's leaves.

    A leaf that is only penalised (an L2 term added to the loss) is not entangled: its penalty
    meets the data only in a sum.
    """
    reader = _Reader()
    body = jaxpr.jaxpr
    # A scalar is a coefficient (a loss scale, a penalty weight); data have a batch axis.
    inputs = [
        _Value(Leaf(i, tuple(range(len(shape_of(v))))))
        if i < num_leaves
        else _Value(data=bool(shape_of(v)))
        for i, v in enumerate(body.invars)
    ]
    reader.walk(body, jaxpr.consts, inputs)
    return Usage(reader.occurrences, reader.models, reader.others, frozenset(reader.entangled))


class _Reader:
    """One pass over a jaxpr, in the order of execution."""

    def __init__(self) -> None:
        self.occurrences: list[Occurrence] = []
        self.models: dict[int, int] = {}
        self.others: dict[int, int] = {}
        self.entangled: set[int] = set()
        self.open: dict[int, Occurrence] = {}  # layer calls being executed
        self.scans: tuple[int, ...] = ()

    def walk(
        self, jaxpr: core.Jaxpr, consts: Sequence[jax.Array], inputs: Sequence[_Value]
    ) -> list[_Value]:
        """Reads all equations of a jaxpr; returns its results."""
        constants = [_Value(data=bool(getattr(c, "shape", ()))) for c in consts]
        env: dict[Atom, _Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Atom) -> _Value:
            return _Value() if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: core.JaxprEqn, operands: list[_Value]) -> list[_Value]:
        """Reads one equation; returns its results."""
        found = mark_of(eqn)
        if found:
            self.note(found, Marked(operands[0].leaf, found.vmapped))
            return operands
        if eqn.primitive.name == "optimization_barrier":
            return operands

        # An equation with a body that can be followed is read in place.
        body = body_of(eqn)
        if body and body.kind != "scan":
            return self.walk(body.jaxpr, body.consts, operands)
        hidden = list(marks_below(eqn))
        if body and hidden:
            return self.scan(eqn, body, operands)

        # Any other equation hides its markers, and its results depend on all operands.
        for found in hidden:
            self.note(found, Marked(None, found.vmapped), inside=eqn.primitive.name)
        return [self.combine(eqn, operands)] * len(eqn.outvars)

    def scan(self, eqn: core.JaxprEqn, body: Body, operands: list[_Value]) -> list[_Value]:
        """Reads one iteration for all of them; returns the results of the scan."""
        layout = scan_layout(eqn, body)
        num_consts, carried = layout.consts, layout.consts + layout.carry

        # Each iteration sees a constant as it is, and a slice of what the scan runs over.
        inputs: list[_Value] = []
        for i, value in enumerate(operands):
            leaf = value.leaf
            if leaf and i < num_consts:
                inputs.append(value._replace(leaf=leaf._replace(scanned=(*leaf.scanned, None))))
            elif leaf and i >= carried:
                first, *rest = leaf.axes
                leaf = Leaf(leaf.number, tuple(rest), (*leaf.scanned, first))
                inputs.append(value._replace(leaf=leaf))
            else:  # a carried value may change from one iteration to the next
                data = value.data or i >= num_consts
                inputs.append(_Value(reads=value.all_reads(), data=data))

        self.scans = (*self.scans, eqn.params["length"])
        outputs = self.walk(body.jaxpr, body.consts, inputs)
        self.scans = self.scans[:-1]

        # A leaf read in one iteration may meet the data in the next.
        for before, after in zip(inputs[num_consts:carried], outputs, strict=False):
            self.entangled |= after.all_reads() - before.reads
        return [_Value(reads=v.all_reads(), data=True) for v in outputs]

    def note(self, found: Mark, marked: Marked, inside: str | None = None) -> None:
        """Notes a marker, and opens or closes the layer call that it begins or ends."""
        if found.role == "model":
            self.models[found.call] = max(len(self.scans), self.models.get(found.call, 0))
            return
        if found.role.startswith("other_"):
            if marked.leaf is not None:
                self.others.setdefault(marked.leaf.number, found.call)
            return
        if found.role == "begin":
            occurrence = Occurrence(found.call, {}, self.scans, inside)
            self.occurrences.append(occurrence)
            self.open[found.call] = occurrence
        if found.call in self.open:
            self.open[found.call].marks[found.role] = marked
        if found.role == "end":
            self.open.pop(found.call, None)

    def combine(self, eqn: core.JaxprEqn, operands: list[_Value]) -> _Value:
        """The result of an ordinary equation; marks the leaves that meet the data there."""
        name = eqn.primitive.name
        copy = _copied_leaf(eqn, operands)
        if copy is not None:
            return copy

        # Inside the layer that owns it, reading a leaf is what the statistics see.
        owned = self.owned_leaves()
        foreign = [
            v.reads if v.leaf and v.leaf.number in owned else v.all_reads() for v in operands
        ]
        reads: frozenset[int] = frozenset().union(*foreign)
        data = any(v.data for v in operands) or bool(self.open)

        # Leaves and data may only meet in a sum, or be scaled by something that depends on neither.
        if reads and data:
            tainted = [bool(r) or v.data for r, v in zip(foreign, operands, strict=True)]
            scaled = (
                name in ("mul", "div") and sum(tainted) == 1 and not (name == "div" and tainted[1])
            )
            if self.open or not (name in _LINEAR or scaled):
                self.entangled |= reads
                reads = frozenset()
        return _Value(reads=reads, data=data)

    def owned_leaves(self) -> set[int]:
        """Kernels and biases of the layer calls being executed."""
        return {
            marked.leaf.number
            for occurrence in self.open.values()
            if occurrence.inside is None
            for role, marked in occurrence.marks.items()
            if role in ("kernel", "bias") and marked.leaf is not None
        }


def _copied_leaf(eqn: core.JaxprEqn, operands: list[_Value]) -> _Value | None:
    """The result of an equation that copies or transposes a leaf; None for any other."""
    leaf = operands[0].leaf if len(operands) == 1 else None
    if leaf is None:
        return None
    if eqn.primitive.name in _COPIES:
        aval = eqn.outvars[0].aval
        is_real = isinstance(aval, ShapedArray) and jnp.issubdtype(aval.dtype, jnp.floating)
        return operands[0] if is_real else None  # rounding to integers is no copy
    if eqn.primitive.name == "transpose":
        axes = tuple(leaf.axes[axis] for axis in eqn.params["permutation"])
        return operands[0]._replace(leaf=leaf._replace(axes=axes))
    return None
