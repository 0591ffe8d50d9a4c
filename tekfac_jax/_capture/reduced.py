"""Statistics that are contracted in the backward pass, while (a, u) are in memory.

What a layer leaves behind is then as large as its curvature, not as its activations: `nn.remat` and
`nn.scan` keep their memory savings, and the statistics of micro-batches add up. Θ needs a basis,
and the only one known at that point is the one in the optimizer state when the step begins.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._capture.coverage import CapturedCall
from tekfac_jax._capture.plan import Plan
from tekfac_jax._curvature.by_kind import factors_of, rescaling_of
from tekfac_jax._curvature.chunks import Contraction, sum_over_examples
from tekfac_jax._curvature.eigenbasis import Basis
from tekfac_jax._layers.spec import LayerSpec, at_least_float32, replace, zeros_like
from tekfac_jax._layers.statistics import Capture, FactorKind, Reduced, ReducedStatistics
from tekfac_jax._layers.types import Params, PyTree
from tekfac_jax._tracing.replay import Rule, Tag

S = TypeVar("S")
# The sums of a layer that is called once, the captures of any other.
_Slots: TypeAlias = dict[str, PyTree]


class _Operands(NamedTuple):
    """What is needed to form the sums of one layer."""

    basis: Basis | None
    scale: jax.Array  # factor that turns u into the gradient of the summed loss
    when: jax.Array


class _Slot(NamedTuple):
    """The slot of a layer that is called once."""

    sums: Reduced
    operands: _Operands | None  # None in the slot's gradient


def reduce(
    spec: LayerSpec,
    factors: FactorKind,
    captures: tuple[Capture, ...],
    basis: Basis | None,
    scale: jax.Array,
    when: jax.Array,
) -> Reduced:
    """The sums of one layer, or zeros where `when` is False."""
    dtype = at_least_float32(spec.dtype)

    def contract() -> Reduced:
        def total(contraction: Contraction[S]) -> S:
            return sum_over_examples(contraction, spec, captures, scale, dtype)

        phi, psi = total(factors_of(spec, factors))
        theta, rest = total(rescaling_of(spec, *basis)) if basis else (None, None)
        return Reduced(phi, psi, theta, rest)

    nothing = jax.eval_shape(contract)
    return lax.cond(when, contract, lambda: jax.tree.map(zeros_like, nothing))


def _contraction_rule(spec: LayerSpec, factors: FactorKind, use: CapturedCall) -> Rule:
    """The rule that returns the sums of a layer's only call."""
    vmapped = use.occurrence.marks["end"].vmapped
    # A call sees all layers that vmap stacks, but only one of those that a scan stacks.
    inner = replace(spec, stack=vmapped)
    shape, dtype = (*vmapped, *use.call.input.shape), use.call.input.dtype

    @jax.custom_vjp
    def tag(y: jax.Array, a: jax.Array, slot: _Slot) -> jax.Array:
        del a, slot
        return y

    def forward(
        y: jax.Array, a: jax.Array, slot: _Slot
    ) -> tuple[jax.Array, tuple[jax.Array, _Operands]]:
        assert slot.operands is not None
        return y, (a, slot.operands)

    def backward(kept: tuple[jax.Array, _Operands], u: jax.Array) -> tuple[jax.Array, None, _Slot]:
        a, operands = kept
        return u, None, _Slot(reduce(inner, factors, (Capture(a, u),), *operands), None)

    tag.defvjp(forward, backward)

    def rule(y: jax.Array, x: jax.Array, slot: _Slot) -> jax.Array:
        return tag(y, jnp.broadcast_to(lax.stop_gradient(x.astype(dtype)), shape), slot)

    return rule


class ReducedCollector(NamedTuple):
    """Contracts the captures of one plan in the backward pass.

    Only a layer that is called once can be contracted right there. If there are several calls, the
    gradients of an example add up before anything is squared, so they must be known together:
    such a layer keeps its captures and is reduced at the end.
    """

    plan: Plan
    specs: Mapping[str, LayerSpec]
    factors: FactorKind
    bases: Mapping[str, Basis] | None
    scale: jax.Array
    examples: jax.Array  # how many examples count
    when: jax.Array  # whether anything is contracted

    def slots(self) -> _Slots:
        """Zeros: the sums of a layer that is called once, the captures of any other."""
        captures = self.plan.slots()
        return {
            path: captures[path] if use is None else self._zeros(spec, use.call.output)
            for path, spec in self.specs.items()
            for use in [self.plan.call_of(path)]
        }

    def run(self, params: Params, slots: _Slots) -> PyTree:
        """The function's output, with a tag on each call of a layer."""
        tags: dict[str, list[Tag]] = {}
        for path, spec in self.specs.items():
            use = self.plan.call_of(path)
            if use is None:
                tags[path] = self.plan.capture_tags(path, slots[path])
            else:
                rule = _contraction_rule(spec, self.factors, use)
                tags[path] = [Tag(rule, self._slot(path, slots[path], use))]
        return self.plan.run_with(params, tags)

    def finish(self, found: _Slots) -> ReducedStatistics:
        """Statistics from what the slots received."""
        layers: dict[str, Reduced] = {}
        for path, spec in self.specs.items():
            if self.plan.call_of(path) is None:
                arguments = found[path], self._basis(path), self.scale, self.when
                layers[path] = reduce(spec, self.factors, *arguments)
            else:
                layers[path] = found[path]
        examples = jnp.where(self.when, self.examples, 0)
        return ReducedStatistics(layers, examples, self.factors)

    def _basis(self, path: str) -> Basis | None:
        return self.bases[path] if self.bases else None

    def _zeros(self, spec: LayerSpec, output: jax.ShapeDtypeStruct) -> Reduced:
        i, o, dtype = spec.in_dim, spec.out_dim, at_least_float32(spec.dtype)

        def zeros(*shape: int) -> jax.Array:
            def like(output: jax.Array) -> jax.Array:
                return jnp.broadcast_to(jnp.sum(output), (*spec.lead, *shape)).astype(dtype)

            return zeros_like(jax.eval_shape(like, output))

        phi = zeros(i, i) if spec.has_input_basis else zeros(i)
        basis = self._basis(spec.path)
        if basis is None:
            return Reduced(phi, zeros(o, o), None)
        rows = i if basis.q_phi is None else basis.q_phi.shape[-1]
        return Reduced(phi, zeros(o, o), zeros(rows, basis.q_psi.shape[-1]), zeros())

    def _slot(self, path: str, zeros: Reduced, use: CapturedCall) -> _Slot:
        scans = use.occurrence.scans
        scale, when = (jnp.broadcast_to(x, scans) for x in (self.scale, self.when))
        return _Slot(zeros, _Operands(self._basis(path), scale, when))
