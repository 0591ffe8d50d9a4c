"""The three refreshes of a layer's curvature, each at its interval.

Factors, eigenbasis and re-scaling; where the statistics come from (captured, or contracted in the
backward pass) is the business of a source.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._curvature import dense
from tekfac_jax._curvature.by_kind import FORMED_IN_ALL, numbers_formed_once
from tekfac_jax._curvature.decomposition import (
    Method,
    eigenvectors,
    starts_from_old_basis,
    updated_eigenvectors,
)
from tekfac_jax._curvature.eigenbasis import eigenvalues_in, rotate, trace, transport
from tekfac_jax._curvature.equal_shapes import batches_equal_shapes, by_shape
from tekfac_jax._devices.collectives import Devices
from tekfac_jax._layers.spec import LayerSpec, keeps_all, zeros_like
from tekfac_jax._layers.statistics import FactorKind
from tekfac_jax._optimizer.batch import Batch
from tekfac_jax._optimizer.family import Member, kind_of_factors
from tekfac_jax._optimizer.options import Number, Options
from tekfac_jax._optimizer.schedule import is_due
from tekfac_jax._optimizer.sums import Captured, Formed, Source
from tekfac_jax._state.layout import KINDS, LayerState, debiased, expand_lead, unit_trace

# Of what `LayerState.failed_in_a_row` counts.
_FACTORS, _EIGENBASIS, _RESCALING = range(KINDS)


class Tools(NamedTuple):
    """What the three refreshes of a layer have in common."""

    spec: LayerSpec
    member: Member
    options: Options
    step: jax.Array
    devices: Devices
    offset: int  # of the steps at which this layer is refreshed

    def refresh(
        self, due: jax.Array, function: Callable[[LayerState], LayerState], layer: LayerState
    ) -> LayerState:
        """Runs `function` if it is due; of several layers it changes those for which it is."""

        def run(layer: LayerState) -> LayerState:
            new = function(layer)
            return jax.tree.map(lambda x, y: jnp.where(expand_lead(due, x), x, y), new, layer)

        return lax.cond(
            jnp.any(due), run if self.spec.lead else function, lambda layer: layer, layer
        )

    def at_interval(self, interval: int) -> jax.Array:
        return is_due(self.step, self.offset, interval, early=self.options.early_refreshes)

    @property
    def kind_of_factors(self) -> FactorKind:
        return kind_of_factors(self.member, self.options)


def _mean(total: Any, examples: jax.Array) -> Any:
    return jax.tree.map(lambda x: x / examples.astype(x.dtype), total)


def update_layers(
    tools: Mapping[str, Tools], layers: Mapping[str, LayerState], sources: Mapping[str, Captured]
) -> dict[str, LayerState]:
    """Factors, eigenbasis and Θ of all layers, from what was captured.

    Layer by layer, so that little memory is in use at once; or in stages, each of them for all
    layers: where devices share the work none waits for another within a layer, and on GPU
    decompositions of equal size are one call.
    """
    if not _in_stages(tools):
        return {path: _update_layer(tools[path], layers[path], sources[path]) for path in layers}

    def run(layers: dict[str, LayerState]) -> dict[str, LayerState]:
        shared = _formed_once(tools, layers, sources)
        layers = {p: update_factors(tools[p], layer, shared[p]) for p, layer in layers.items()}
        layers = update_eigenbases(tools, layers)
        return {p: update_rescaling(tools[p], layer, shared[p]) for p, layer in layers.items()}

    due = [jnp.any(_due(tools[path], layer)) for path, layer in layers.items()]
    return lax.cond(jnp.any(jnp.stack(due)), run, lambda layers: layers, dict(layers))


def _in_stages(tools: Mapping[str, Tools]) -> bool:
    first = next(iter(tools.values()))
    return first.devices.plan is not None or (batches_equal_shapes() and not first.options.stagger)


def _formed_once(
    tools: Mapping[str, Tools], layers: Mapping[str, LayerState], sources: Mapping[str, Captured]
) -> dict[str, Captured | Formed]:
    """The sources of all layers, with G_n where it serves twice and memory allows."""
    shared: dict[str, Captured | Formed] = dict(sources)
    left = FORMED_IN_ALL
    for path, layer in layers.items():
        numbers = _numbers_formed_once(tools[path], layer, sources[path])
        if 0 < numbers <= left:
            left -= numbers
            needed = jnp.any(_factors_due(tools[path], layer) | _rescaling_due(tools[path], layer))
            shared[path] = sources[path].formed(tools[path].spec, layer, needed)
    return shared


def _numbers_formed_once(tools: Tools, layer: LayerState, source: Captured) -> int:
    """The size of the G_n that serve factors and Θ; 0: each contracts by itself."""
    member, options = tools.member, tools.options
    both = tools.kind_of_factors == "exact" and member.measured and options.rescaling == "exact"
    return numbers_formed_once(tools.spec, source.captures, layer.theta.shape) if both else 0


def _update_layer(tools: Tools, layer: LayerState, source: Captured) -> LayerState:
    """Factors, eigenbasis and Θ of one layer; what two of them need is formed once."""

    def each(layer: LayerState, source: Captured | Formed) -> LayerState:
        layer = update_factors(tools, layer, source)
        layer = _update_eigenbasis(tools, layer)
        return update_rescaling(tools, layer, source)

    if not _numbers_formed_once(tools, layer, source):
        return each(layer, source)

    def run(layer: LayerState) -> LayerState:
        needed = jnp.any(_factors_due(tools, layer) | _rescaling_due(tools, layer))
        return each(layer, source.formed(tools.spec, layer, needed))

    return lax.cond(jnp.any(_due(tools, layer)), run, lambda layer: layer, layer)


def _due(tools: Tools, layer: LayerState) -> jax.Array:
    return _factors_due(tools, layer) | _basis_due(tools, layer) | _rescaling_due(tools, layer)


def update_factors(tools: Tools, layer: LayerState, source: Source) -> LayerState:
    """Every T_FIM steps: δΦ and δΨ (Eq. 2.10), averaged (Eq. 3.7, 3.8)."""
    member, options = tools.member, tools.options

    def average(layer: LayerState) -> LayerState:
        sums = source.factors(tools.spec, layer, tools.kind_of_factors)
        total = tools.devices.total_of_factors(sums, tools.spec)
        # Of a sum of squares the diagonal is not finite where anything is not.
        ok = jnp.isfinite(trace(total.phi, layer.q_phi) + trace(total.psi, layer.q_psi))
        new = _mean(total, source.examples)
        beta = options.factor_decay
        phi = _average(ok, beta, layer.phi, new.phi)
        psi = _average(ok, beta, layer.psi, new.psi)
        weight = _average(ok, beta, layer.factor_weight, 1.0)
        delta = debiased(trace(phi, layer.q_phi), weight)
        if member.plain:
            delta = delta * debiased(trace(psi, layer.q_psi), weight)
        return layer._replace(
            phi=phi,
            psi=psi,
            factor_weight=weight,
            delta=delta,
            **_noted(layer, _FACTORS, ok),
        )

    due = _factors_due(tools, layer) & (source.examples != 0)
    with jax.named_scope("tekfac factors"):
        return tools.refresh(due, average, layer)


def _factors_due(tools: Tools, layer: LayerState) -> jax.Array:
    return tools.at_interval(tools.options.factor_interval) | (layer.factor_weight == 0)


def update_eigenbases(
    tools: Mapping[str, Tools], layers: Mapping[str, LayerState]
) -> dict[str, LayerState]:
    """Every T_EIG steps: Q_Φ and Q_Ψ (Eq. 3.1), and Θ seen in the new basis.

    In stages all layers decompose before any result is used: were each to wait for the one
    before, devices that share the work would work one after another.
    """
    if not _in_stages(tools):
        return {path: _update_eigenbasis(tools[path], layer) for path, layer in layers.items()}
    due = {path: _basis_due(tools[path], layer) for path, layer in layers.items()}

    def shared_out(layers: dict[str, LayerState]) -> dict[str, Any]:
        return {path: _bases_if(due[path], tools[path], layer) for path, layer in layers.items()}

    def run(layers: dict[str, LayerState]) -> dict[str, LayerState]:
        is_alone = all(tool.devices.plan is None for tool in tools.values())
        bases = _bases_by_shape(tools, layers) if is_alone else shared_out(layers)
        return {
            path: tools[path].refresh(
                due[path],
                lambda layer, path=path: _adopt(layer, *tools[path].devices.gathered(bases[path])),
                layer,
            )
            for path, layer in layers.items()
        }

    any_due = jnp.any(jnp.stack([jnp.any(d) for d in due.values()]))
    with jax.named_scope("tekfac eigenbasis"):
        return lax.cond(any_due, run, lambda layers: layers, dict(layers))


def _bases_if(due: jax.Array, tools: Tools, layer: LayerState) -> Any:
    """This device's part of a layer's bases, or zeros."""
    function = functools.partial(_own_bases, tools)
    nothing = jax.eval_shape(function, layer)
    return lax.cond(jnp.any(due), function, lambda layer: jax.tree.map(zeros_like, nothing), layer)


def _bases_by_shape(
    tools: Mapping[str, Tools], layers: Mapping[str, LayerState]
) -> dict[str, tuple[Any, jax.Array]]:
    """The bases of all layers, those of equal size together."""
    method = next(iter(tools.values())).options.eigenbasis

    def basis(factor: jax.Array, old: jax.Array, valid: jax.Array) -> jax.Array:
        return _basis_of(factor, old, valid, None, method)

    arguments = {}
    for path, layer in layers.items():
        if layer.q_phi is not None:
            arguments[path, "phi"] = (layer.phi, layer.q_phi, layer.basis_valid)
        arguments[path, "psi"] = (layer.psi, layer.q_psi, layer.basis_valid)
    found = by_shape(basis, arguments)
    return {path: (found.get((path, "phi")), found[path, "psi"]) for path in layers}


def _update_eigenbasis(tools: Tools, layer: LayerState) -> LayerState:
    """The same for one layer on one device."""

    def run(layer: LayerState) -> LayerState:
        return _adopt(layer, *_own_bases(tools, layer))

    with jax.named_scope("tekfac eigenbasis"):
        return tools.refresh(_basis_due(tools, layer), run, layer)


def _basis_due(tools: Tools, layer: LayerState) -> jax.Array:
    """Never before statistics have come: the eigenvectors of zero are arbitrary."""
    due = tools.at_interval(tools.options.eigenbasis_interval) | ~layer.basis_valid
    return due & (layer.factor_weight > 0)


def _own_bases(tools: Tools, layer: LayerState) -> tuple[Any, jax.Array]:
    """Q_Φ and Q_Ψ, as far as this device computes them."""

    def own(side: str, factor: jax.Array, old: jax.Array) -> jax.Array:
        mine = tools.devices.is_mine(tools.spec.path, side, tools.spec.lead)
        return _basis_of(factor, old, layer.basis_valid, mine, tools.options.eigenbasis)

    q_phi = None if layer.q_phi is None else own("phi", layer.phi, layer.q_phi)
    return q_phi, own("psi", layer.psi, layer.q_psi)


def _basis_of(
    factor: jax.Array, old: jax.Array, valid: jax.Array, mine: jax.Array | None, method: Method
) -> jax.Array:
    dim, rank = old.shape[-2:]
    if starts_from_old_basis(dim, rank, method):
        return updated_eigenvectors(factor, old, valid, mine)
    return eigenvectors(factor, mine)[..., dim - rank :]


def _adopt(layer: LayerState, q_phi: Any, q_psi: jax.Array) -> LayerState:
    """The layer with a new basis, or its old one where the new one cannot be used."""
    old, new = (layer.q_phi, layer.q_psi), (q_phi, q_psi)
    moved = transport(layer.theta, layer.rest, old, new)
    # What is not finite in Q is not in Θ either: each of its numbers meets every column's.
    ok = jnp.isfinite(jnp.sum(moved[0], axis=(-2, -1)))
    (q_phi, q_psi), (theta, rest) = jax.tree.map(
        lambda x, y: jnp.where(expand_lead(ok, x), x, y),
        (new, moved),
        (old, (layer.theta, layer.rest)),
    )
    return layer._replace(
        q_phi=q_phi,
        q_psi=q_psi,
        theta=theta,
        rest=rest,
        basis_valid=layer.basis_valid | ok,
        **_noted(layer, _EIGENBASIS, ok),
    )


def update_rescaling(tools: Tools, layer: LayerState, source: Source) -> LayerState:
    """Every T_RE steps: Θ in the basis in force (Eq. 3.2), averaged (Eq. 3.6)."""
    due = _rescaling_due(tools, layer)
    if not tools.member.measured:
        due |= tools.at_interval(tools.options.eigenbasis_interval)
        product = functools.partial(_eigenvalue_product, tools)
        return tools.refresh(due & layer.basis_valid & (layer.factor_weight > 0), product, layer)
    if tools.options.rescaling == "running":
        return layer

    def average(layer: LayerState) -> LayerState:
        total = tools.devices.total(source.rescaling(tools.spec, layer))
        return _average_theta(tools, layer, total, source.examples)

    with jax.named_scope("tekfac rescaling"):
        return tools.refresh(due & layer.basis_valid & (source.examples != 0), average, layer)


def _rescaling_due(tools: Tools, layer: LayerState) -> jax.Array:
    return tools.at_interval(tools.options.rescaling_interval) | (layer.theta_weight == 0)


def update_running_rescaling(
    tools: Tools, layer: LayerState, gradient: jax.Array, batch: Batch
) -> LayerState:
    """Every T_RE steps: Θ from the mini-batch gradient alone, N (Q_Φᵀ ḡ Q_Ψ)² with ḡ = Σ G_n / N.

    Needs no statistics, but its expectation is Θ + (N−1)μ², μ the rotated mean gradient.
    """

    def average(layer: LayerState) -> LayerState:
        dtype = layer.theta.dtype
        to_total = batch.to_mean.astype(dtype) * batch.examples.astype(dtype)
        total = gradient.astype(dtype) * to_total
        theta = rotate(total, layer.q_phi, layer.q_psi) ** 2
        rest = _rest(tools, jnp.sum(total**2, axis=(-2, -1)), theta)
        return _average_theta(tools, layer, dense.Rescaling(theta, rest), batch.examples)

    return tools.refresh(_rescaling_due(tools, layer) & layer.basis_valid, average, layer)


def _eigenvalue_product(tools: Tools, layer: LayerState) -> LayerState:
    """KFAC and TKFAC: Θ = δ λ_Φ⊗λ_Ψ, from factors that are averages already."""
    lambda_phi = eigenvalues_in(unit_trace(layer.phi, layer.q_phi), layer.q_phi)
    lambda_psi = eigenvalues_in(unit_trace(layer.psi, layer.q_psi), layer.q_psi)
    product = lambda_phi[..., :, None] * lambda_psi[..., None, :]
    product = expand_lead(layer.delta, product) * product
    rest = _rest(tools, layer.delta, product)
    return layer._replace(theta=product, rest=rest, theta_weight=jnp.ones_like(layer.theta_weight))


def _rest(tools: Tools, total: jax.Array, theta: jax.Array) -> jax.Array:
    """What of a trace lies outside of the columns that are kept."""
    if keeps_all(tools.spec, theta.shape):
        return jnp.zeros_like(total)
    return jnp.maximum(total - jnp.sum(theta, axis=(-2, -1)), 0)


def _average_theta(
    tools: Tools, layer: LayerState, total: dense.Rescaling, examples: jax.Array
) -> LayerState:
    ok = jnp.isfinite(jnp.sum(total.theta, axis=(-2, -1)) + total.rest)
    new, beta = _mean(total, examples), tools.options.rescaling_decay
    is_whole = keeps_all(tools.spec, layer.theta.shape)
    return layer._replace(
        theta=_average(ok, beta, layer.theta, new.theta),
        rest=layer.rest if is_whole else _average(ok, beta, layer.rest, new.rest),
        theta_weight=_average(ok, beta, layer.theta_weight, 1.0),
        **_noted(layer, _RESCALING, ok),
    )


def _noted(layer: LayerState, kind: int, ok: jax.Array) -> dict[str, jax.Array]:
    """The fields that count failures, after a refresh of one kind."""
    before, failed = layer.failed_in_a_row, jnp.int32(~ok)
    after = (before + 1) * failed[..., None]
    return {
        "failures": layer.failures + failed,
        "failed_in_a_row": jnp.where(jnp.arange(KINDS) == kind, after, before),
    }


def _average(ok: jax.Array, beta: Number, old: jax.Array, new: jax.Array | float) -> jax.Array:
    """X ← βX + (1−β)X_new, or X where the new value cannot be used."""
    beta = jnp.asarray(beta, old.dtype)
    return jnp.where(expand_lead(ok, old), beta * old + (1 - beta) * new, old)
