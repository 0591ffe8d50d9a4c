"""Statistics that are contracted in the backward pass, where (a, u) are still at hand.

What is kept of a layer is then as large as its curvature, not as its activations: under `nn.remat`
and `nn.scan` the saving of memory stays, and the statistics of micro-batches simply add up. Θ needs
a basis, and the only one there is yet is that of the optimizer's state when the step begins.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._capture.coverage import CapturedCall
from tekfac_jax._capture.plan import Plan
from tekfac_jax._curvature.by_kind import factors_of, rescaling_of
from tekfac_jax._curvature.chunks import sum_over_examples
from tekfac_jax._curvature.eigenbasis import Basis
from tekfac_jax._layers.spec import LayerSpec, at_least_float32, replace, zeros_like
from tekfac_jax._layers.statistics import Capture, FactorKind, Reduced, ReducedStatistics
from tekfac_jax._tracing.replay import Rule, Tag


class _Slot(NamedTuple):
    zeros: Reduced
    basis: Any
    scale: Any  # what turns u into the gradient of the summed loss
    when: Any


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
        def total(contraction: Any) -> Any:
            return sum_over_examples(contraction, spec, captures, scale, dtype)

        phi, psi = total(factors_of(spec, factors))
        theta, rest = total(rescaling_of(spec, *basis)) if basis else (None, None)
        return Reduced(phi, psi, theta, rest)

    nothing = jax.eval_shape(contract)
    return lax.cond(when, contract, lambda: jax.tree.map(zeros_like, nothing))


def _contracting(spec: LayerSpec, factors: FactorKind, use: CapturedCall) -> Rule:
    """The rule that hands out the sums of a call that is a layer's only one."""
    vmapped = use.occurrence.marks["end"].vmapped
    # Of the stack a call inside a scan sees one layer; what vmap stacks it sees as a whole.
    inner = replace(spec, stack=vmapped)
    shape, dtype = (*vmapped, *use.call.input.shape), use.call.input.dtype

    @jax.custom_vjp
    def tag(y: jax.Array, a: jax.Array, slot: _Slot) -> jax.Array:
        del a, slot
        return y

    def forward(y: jax.Array, a: jax.Array, slot: _Slot) -> Any:
        return y, (a, slot.basis, slot.scale, slot.when)

    def backward(kept: Any, u: jax.Array) -> Any:
        a, *rest = kept
        return u, None, _Slot(reduce(inner, factors, (Capture(a, u),), *rest), None, None, None)

    tag.defvjp(forward, backward)

    def rule(y: jax.Array, x: jax.Array, slot: _Slot) -> jax.Array:
        return tag(y, jnp.broadcast_to(lax.stop_gradient(x.astype(dtype)), shape), slot)

    return rule


class Reduction(NamedTuple):
    """How the layers of one plan are reduced."""

    plan: Plan
    specs: Mapping[str, LayerSpec]
    factors: FactorKind
    bases: Mapping[str, Basis] | None
    scale: jax.Array
    examples: jax.Array  # that count
    when: jax.Array

    def slots(self) -> dict[str, Any]:
        """Zeros: of a layer that is called once its sums, of another its captures.

        Of several calls the gradients of an example add up before anything is squared, so they
        must be known together.
        """
        captures = self.plan.slots()
        return {
            path: captures[path] if use is None else self._zeros(spec, use.call.output)
            for path, spec in self.specs.items()
            for use in [self.plan.call_of(path)]
        }

    def run(self, params: Any, slots: Mapping[str, Any]) -> Any:
        """The function's output, with a tag on each call of a layer."""
        tags = {}
        for path, spec in self.specs.items():
            use = self.plan.call_of(path)
            if use is None:
                tags[path] = self.plan.captures(path, slots[path])
            else:
                rule = _contracting(spec, self.factors, use)
                tags[path] = [Tag(rule, self._slot(path, slots[path], use))]
        return self.plan.run_with(params, tags)

    def finish(self, found: Mapping[str, Any]) -> ReducedStatistics:
        """Statistics from what the slots received."""
        layers = {}
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
        return _Slot(zeros, self._basis(path), scale, when)
