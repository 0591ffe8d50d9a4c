"""Where a layer's sums over examples come from: its captures, G_n, or the backward pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._curvature import dense
from tekfac_jax._curvature.by_kind import factors_of, rescaling_of
from tekfac_jax._curvature.chunks import (
    chunk_size_of,
    map_over_examples,
    sum_in_chunks,
    sum_over_examples,
)
from tekfac_jax._layers.spec import LayerSpec, keeps_all, zeros_like
from tekfac_jax._layers.statistics import Capture, FactorKind, Reduced
from tekfac_jax._state.layout import LayerState


class Captured(NamedTuple):
    """A layer's statistics as they were captured."""

    captures: tuple[Capture, ...]
    scale: jax.Array
    examples: jax.Array  # over all devices

    def factors(self, spec: LayerSpec, layer: LayerState, kind: FactorKind) -> Any:
        """Sums over examples: δΦ and δΨ."""
        return self._total(factors_of(spec, kind), spec, layer)

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> Any:
        """Sums over examples: Θ in the layer's basis, and the rest."""
        return self._total(rescaling_of(spec, layer.q_phi, layer.q_psi), spec, layer)

    def formed(self, spec: LayerSpec, layer: LayerState, needed: jax.Array) -> "Formed":
        """G_n of every example, or zeros where it is not `needed`."""

        def form() -> jax.Array:
            captures, dtype = self.captures, layer.theta.dtype
            return map_over_examples(dense.gradients, spec, captures, self.scale, dtype)

        nothing = jax.eval_shape(form)
        with jax.named_scope("tekfac gradients"):
            g = lax.cond(needed, form, lambda: zeros_like(nothing))
        return Formed(g, self.examples)

    def _total(self, contract: Any, spec: LayerSpec, layer: LayerState) -> Any:
        return sum_over_examples(contract, spec, self.captures, self.scale, layer.theta.dtype)


class Formed(NamedTuple):
    """The gradients of a layer's examples, from which both factors and Θ are contracted."""

    g: jax.Array  # (*lead, n, i, o)
    examples: jax.Array  # over all devices

    def factors(self, spec: LayerSpec, layer: LayerState, kind: FactorKind) -> Any:
        """The same as of `Captured`; only exact factors come from G_n."""
        del layer
        assert kind == "exact"
        return self._total(dense.factors_of_gradients, spec)

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> Any:
        """The same as of `Captured`."""

        def contract(g: jax.Array) -> dense.Rescaling:
            theta = dense.rescaling_of_gradients(g, layer.q_phi, layer.q_psi)
            kept = jnp.sum(theta, axis=(-2, -1))
            if keeps_all(spec, theta.shape):
                return dense.Rescaling(theta, jnp.zeros_like(kept))
            return dense.Rescaling(theta, jnp.sum(g**2, axis=(-3, -2, -1)) - kept)

        return self._total(contract, spec)

    def _total(self, contract: Any, spec: LayerSpec) -> Any:
        axis = len(spec.lead)
        return sum_in_chunks(contract, self.g, axis, chunk_size_of(self.g, axis))


class Summed(NamedTuple):
    """A layer's statistics, contracted in the backward pass."""

    reduced: Reduced
    examples: jax.Array  # over all devices; 0: nothing was contracted

    def factors(self, spec: LayerSpec, layer: LayerState, kind: FactorKind) -> Any:
        """The same as of `Captured`, contracted already."""
        del spec, kind
        dtype = layer.theta.dtype
        return dense.Factors(self.reduced.phi.astype(dtype), self.reduced.psi.astype(dtype))

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> Any:
        """The same as of `Captured`, contracted already."""
        del spec
        dtype = layer.theta.dtype
        return dense.Rescaling(self.reduced.theta.astype(dtype), self.reduced.rest.astype(dtype))


Source = Captured | Formed | Summed
