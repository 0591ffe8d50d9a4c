"""Sources: where a layer's sums over examples come from.

A source supplies the sums for the averages of factors and Θ. It takes them from raw captures, from
the gradients G_n formed once for both, from sums that the backward pass contracted, or from the
mini-batch gradient alone.
"""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._curvature import dense
from tekfac_jax._curvature.by_kind import factors_of, rescaling_of
from tekfac_jax._curvature.chunks import (
    Contraction,
    chunk_size_of,
    map_over_examples,
    sum_in_chunks,
    sum_over_examples,
)
from tekfac_jax._curvature.eigenbasis import rotate
from tekfac_jax._layers.spec import Layers, LayerSpec, zeros_like
from tekfac_jax._layers.statistics import (
    Capture,
    FactorKind,
    Reduced,
    ReducedStatistics,
    Statistics,
)
from tekfac_jax._optimizer.batch import Batch, sampled
from tekfac_jax._optimizer.options import Options
from tekfac_jax._state.layout import LayerState

T = TypeVar("T")


class ThetaSource(Protocol):
    """Supplies the sums for Θ of one layer."""

    @property
    def examples(self) -> jax.Array:
        """How many examples are summed, on all devices; 0: there are no sums."""
        ...

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> dense.Rescaling:
        """Θ in the layer's basis and the trace outside it, summed over examples."""
        ...


class Source(ThetaSource, Protocol):
    """Supplies the sums for factors and Θ of one layer."""

    def factors(self, spec: LayerSpec, layer: LayerState, kind: FactorKind) -> dense.Factors:
        """δΦ and δΨ, summed over examples (plain factors: A and U)."""
        ...


class FromCaptures(NamedTuple):
    """Raw statistics: (a, u) for each call of the layer."""

    captures: tuple[Capture, ...]
    scale: jax.Array
    examples: jax.Array

    def factors(self, spec: LayerSpec, layer: LayerState, kind: FactorKind) -> dense.Factors:
        """Contracts the captures."""
        return self._total(factors_of(spec, kind), spec, layer)

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> dense.Rescaling:
        """Contracts the captures with the layer's basis."""
        return self._total(rescaling_of(spec, layer.q_phi, layer.q_psi), spec, layer)

    def formed(self, spec: LayerSpec, layer: LayerState, needed: jax.Array) -> "FromGradients":
        """The gradients G_n of the same examples; zeros unless `needed`."""

        def form() -> jax.Array:
            captures, dtype = self.captures, layer.theta.dtype
            return map_over_examples(dense.gradients, spec, captures, self.scale, dtype)

        nothing = jax.eval_shape(form)
        with jax.named_scope("tekfac gradients"):
            g = cast(jax.Array, lax.cond(needed, form, lambda: zeros_like(nothing)))
        return FromGradients(g, self.examples)

    def _total(self, contract: Contraction[T], spec: LayerSpec, layer: LayerState) -> T:
        return sum_over_examples(contract, spec, self.captures, self.scale, layer.theta.dtype)


class FromGradients(NamedTuple):
    """The gradient G_n of each example, from which both factors and Θ are contracted."""

    g: jax.Array  # (*lead, n, i, o)
    examples: jax.Array

    def factors(self, spec: LayerSpec, layer: LayerState, kind: FactorKind) -> dense.Factors:
        """Contracts G_n; only exact factors come from it."""
        del layer
        assert kind == "exact"
        return self._total(dense.factors_of_gradients, spec)

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> dense.Rescaling:
        """Contracts G_n with the layer's basis."""

        def contract(g: jax.Array) -> dense.Rescaling:
            theta = dense.rescaling_of_gradients(g, layer.q_phi, layer.q_psi)
            return dense.with_rest(spec, theta, lambda: jnp.sum(g**2, axis=(-3, -2, -1)))

        return self._total(contract, spec)

    def _total(self, contract: Callable[[jax.Array], T], spec: LayerSpec) -> T:
        axis = len(spec.lead)
        return sum_in_chunks(contract, self.g, axis, chunk_size_of(self.g, axis))


class FromSums(NamedTuple):
    """Reduced statistics, contracted in the backward pass; Θ is in the basis before the step."""

    reduced: Reduced
    examples: jax.Array

    def factors(self, spec: LayerSpec, layer: LayerState, kind: FactorKind) -> dense.Factors:
        """Returns the sums unchanged."""
        del spec, kind
        dtype = layer.theta.dtype
        return dense.Factors(self.reduced.phi.astype(dtype), self.reduced.psi.astype(dtype))

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> dense.Rescaling:
        """Returns the sums unchanged."""
        del spec
        dtype = layer.theta.dtype
        assert self.reduced.theta is not None
        assert self.reduced.rest is not None
        return dense.Rescaling(self.reduced.theta.astype(dtype), self.reduced.rest.astype(dtype))


class FromMiniBatch(NamedTuple):
    """The mini-batch gradient alone: it gives Θ only, and a biased one.

    The estimate is N (Q_Φᵀ ḡ Q_Ψ)² with ḡ = Σ G_n / N. Its expectation is Θ + (N−1)μ², where μ is
    the expected gradient in the eigenbasis.
    """

    gradient: jax.Array  # (*lead, i, o), as the transformation receives it
    batch: Batch

    @property
    def examples(self) -> jax.Array:
        """How many examples the gradient comes from."""
        return self.batch.examples

    def rescaling(self, spec: LayerSpec, layer: LayerState) -> dense.Rescaling:
        """The squared gradient of the summed loss, in the layer's basis."""
        dtype = layer.theta.dtype
        to_total = self.batch.to_mean.astype(dtype) * self.batch.examples.astype(dtype)
        total = self.gradient.astype(dtype) * to_total
        theta = rotate(total, layer.q_phi, layer.q_psi) ** 2
        theta, rest = dense.with_rest(spec, theta, lambda: jnp.sum(total**2, axis=(-2, -1)))
        return dense.Rescaling(theta, jnp.maximum(rest, 0))  # rounding may leave less


def sources_of(
    stats: Statistics | ReducedStatistics, layers: Layers, options: Options, examples: jax.Array
) -> Mapping[str, FromCaptures] | Mapping[str, FromSums]:
    """The source of each layer; raw statistics are thinned to `statistics_examples`."""
    if isinstance(stats, ReducedStatistics):
        return {path: FromSums(reduced, examples) for path, reduced in stats.layers.items()}
    found: dict[str, FromCaptures] = {}
    for path, spec in layers.items():
        some, share = sampled(stats.layers[path], spec, options.statistics_examples)
        found[path] = FromCaptures(some, stats.scale, share * examples)
    return found
