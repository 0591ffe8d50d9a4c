"""The three refreshes of the curvature (factors, eigenbasis, Θ), each for a group of layers."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._curvature.by_kind import FORMED_IN_ALL, numbers_formed_once
from tekfac_jax._curvature.decomposition import (
    Method,
    eigenvectors,
    starts_from_old_basis,
    updated_eigenvectors,
)
from tekfac_jax._curvature.dense import with_rest
from tekfac_jax._curvature.eigenbasis import Basis, eigenvalues_in, trace, transport
from tekfac_jax._curvature.equal_shapes import batches_equal_shapes, by_shape
from tekfac_jax._devices.collectives import Devices
from tekfac_jax._layers.spec import Layers, LayerSpec, keeps_all, unchanged
from tekfac_jax._optimizer.family import kind_of_factors
from tekfac_jax._optimizer.options import Number, Options
from tekfac_jax._optimizer.schedule import Clock
from tekfac_jax._optimizer.sums import FromCaptures, Source, ThetaSource
from tekfac_jax._state.family import Member
from tekfac_jax._state.layout import KINDS, LayerState, debiased, expand_lead, unit_trace

T = TypeVar("T")

# Which counter of `LayerState.failed_in_a_row` belongs to which refresh.
_FACTORS, _EIGENBASIS, _RESCALING = range(KINDS)


class LayerContext(NamedTuple):
    """What the refreshes of one layer need besides its state and its statistics."""

    spec: LayerSpec
    member: Member
    options: Options
    clock: Clock
    devices: Devices

    def when(
        self, due: jax.Array, function: Callable[[LayerState], LayerState], layer: LayerState
    ) -> LayerState:
        """`function(layer)` if due, else `layer`; stacked layers change only where they are due."""

        def run(layer: LayerState) -> LayerState:
            return chosen(due, function(layer), layer)

        branch = run if self.spec.lead else function
        return cast(LayerState, lax.cond(jnp.any(due), branch, unchanged, layer))


def chosen(which: jax.Array, new: T, old: T) -> T:
    """Each array of `new` where `which` (*lead) is true, of `old` elsewhere."""

    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(expand_lead(which, x), x, y)

    return jax.tree.map(choose, new, old)


Group = Mapping[str, LayerContext]  # layers that are refreshed together, by path
Held = Mapping[str, LayerState]  # their curvature


def contexts_of(
    layers: Layers,
    member: Member,
    options: Options,
    offsets: Mapping[str, int],
    step: jax.Array,
    devices: Devices,
) -> Group:
    """The context of every layer at one step."""
    return {
        path: LayerContext(spec, member, options, Clock(step, offsets[path], options), devices)
        for path, spec in layers.items()
    }


def groups_of(contexts: Group) -> list[Group]:
    """One group per layer, which limits peak memory; or one group of all layers.

    There is one group in two cases. Where devices share the work, no device then waits in the
    middle of a layer for another's decomposition. On GPU, decompositions of equal size are one
    batched call; but not if the layers are staggered, because then only few are due at a time.
    """
    first = next(iter(contexts.values()))
    together = first.devices.plan is not None or (
        batches_equal_shapes() and not first.options.stagger
    )
    return [contexts] if together else [{path: own} for path, own in contexts.items()]


def any_due(group: Group, held: Held) -> jax.Array:
    """Whether any layer of the group has any refresh due."""
    due = [jnp.any(own.clock.any_due(held[path])) for path, own in group.items()]
    return jnp.any(jnp.stack(due))


def form_gradients_once(
    group: Group, held: Held, sources: Mapping[str, Source]
) -> Mapping[str, Source]:
    """The sources, with G_n instead of captures where two refreshes need it and memory allows."""
    shared, left = dict(sources), FORMED_IN_ALL
    for path, own in group.items():
        source, layer = sources[path], held[path]
        if not isinstance(source, FromCaptures):
            continue
        numbers = _numbers_formed_once(own, layer, source)
        if 0 < numbers <= left:
            left -= numbers
            needed = own.clock.factors_due(layer) | own.clock.rescaling_due(layer)
            shared[path] = source.formed(own.spec, layer, jnp.any(needed))
    return shared


def _numbers_formed_once(own: LayerContext, layer: LayerState, source: FromCaptures) -> int:
    """How many numbers a G_n for both factors and Θ has; 0 if each contracts by itself."""
    exact_factors = kind_of_factors(own.member, own.options) == "exact"
    measured_theta = own.member.measured and own.options.rescaling == "exact"
    if not (exact_factors and measured_theta):
        return 0
    return numbers_formed_once(own.spec, source.captures, layer.theta.shape)


# --- factors ---------------------------------------------------------------------------------


def update_factors(
    group: Group, held: Held, sources: Mapping[str, Source]
) -> dict[str, LayerState]:
    """Every T_FIM steps: δΦ and δΨ (Eq. 2.10), averaged (Eq. 3.7, 3.8)."""
    with jax.named_scope("tekfac factors"):
        return {path: _new_factors(own, held[path], sources[path]) for path, own in group.items()}


def _new_factors(own: LayerContext, layer: LayerState, source: Source) -> LayerState:
    def average(layer: LayerState) -> LayerState:
        # δΦ and δΨ of this batch, over all devices.
        sums = source.factors(own.spec, layer, kind_of_factors(own.member, own.options))
        total = own.devices.total_of_factors(sums, own.spec)
        new = _mean(total, source.examples)

        # Average both. They are Gram matrices: if any entry is not finite, so is their trace.
        ok = jnp.isfinite(trace(total.phi, layer.q_phi) + trace(total.psi, layer.q_psi))
        beta = own.options.factor_decay
        phi = _average(ok, beta, layer.phi, new.phi)
        psi = _average(ok, beta, layer.psi, new.psi)
        weight = _average(ok, beta, layer.factor_weight, 1.0)

        # δ, the trace of the Fisher block: tr δΦ, or tr A tr U.
        delta = debiased(trace(phi, layer.q_phi), weight)
        if own.member.plain:
            delta = delta * debiased(trace(psi, layer.q_psi), weight)
        return layer._replace(
            phi=phi, psi=psi, factor_weight=weight, delta=delta, **_noted(layer, _FACTORS, ok)
        )

    due = own.clock.factors_due(layer) & (source.examples != 0)
    return own.when(due, average, layer)


# --- eigenbasis ------------------------------------------------------------------------------


def update_eigenbases(group: Group, held: Held) -> dict[str, LayerState]:
    """Every T_EIG steps: Q_Φ and Q_Ψ (Eq. 3.1); Θ is transported into the new basis.

    All layers of the group are decomposed before any result is used. Otherwise devices that share
    the work would work one after another.
    """
    due = {path: own.clock.basis_due(held[path]) for path, own in group.items()}

    def run(held: Held) -> dict[str, LayerState]:
        bases = _decompose(group, held, due)

        def adopt(path: str, layer: LayerState) -> LayerState:
            return _adopt(layer, group[path].devices.gathered(bases[path]))

        return {
            path: own.when(due[path], functools.partial(adopt, path), held[path])
            for path, own in group.items()
        }

    any_due = jnp.any(jnp.stack([jnp.any(own) for own in due.values()]))
    with jax.named_scope("tekfac eigenbasis"):
        return cast(dict[str, LayerState], lax.cond(any_due, run, unchanged, dict(held)))


def _decompose(group: Group, held: Held, due: Mapping[str, jax.Array]) -> dict[str, Basis]:
    """New eigenvectors of all factors; zeros for factors that another device decomposes."""
    method = next(iter(group.values())).options.eigenbasis
    found: dict[tuple[str, str], jax.Array] = {}
    alone: dict[tuple[str, str], tuple[jax.Array, ...]] = {}
    for path, own in group.items():
        layer = held[path]
        for side in ("phi", "psi"):
            factor, old = getattr(layer, side), getattr(layer, f"q_{side}")
            if old is None:  # an embedding: Q_Φ is the identity
                continue
            mine = own.devices.is_mine(path, side, own.spec.lead)
            if mine is None:
                alone[path, side] = factor, old, layer.basis_valid
            else:  # one by one: what is another device's, or not due, is skipped
                wanted = mine & due[path]
                found[path, side] = _eigenvectors(factor, old, layer.basis_valid, wanted, method)
    found |= by_shape(functools.partial(_eigenvectors, wanted=None, method=method), alone)
    return {path: Basis(found.get((path, "phi")), found[path, "psi"]) for path in group}


def _eigenvectors(
    factor: jax.Array, old: jax.Array, valid: jax.Array, wanted: jax.Array | None, method: Method
) -> jax.Array:
    """The top eigenvectors, as many as in `old`; zeros where they are not `wanted`."""
    dim, rank = old.shape[-2:]
    if starts_from_old_basis(dim, rank, method):
        return updated_eigenvectors(factor, old, valid, wanted)
    return eigenvectors(factor, wanted)[..., dim - rank :]


def _adopt(layer: LayerState, basis: Basis) -> LayerState:
    """The layer in a new basis, or in its old one where the new one is not finite."""
    old = Basis(layer.q_phi, layer.q_psi)
    moved = transport(layer.theta, layer.rest, old, basis)
    # Transport multiplies Θ by every column of Q, so an entry of Q that is not finite shows in Θ.
    ok = jnp.isfinite(jnp.sum(moved[0], axis=(-2, -1)))
    (q_phi, q_psi), (theta, rest) = chosen(ok, (basis, moved), (old, (layer.theta, layer.rest)))
    return layer._replace(
        q_phi=q_phi,
        q_psi=q_psi,
        theta=theta,
        rest=rest,
        basis_valid=layer.basis_valid | ok,
        **_noted(layer, _EIGENBASIS, ok),
    )


# --- Θ ---------------------------------------------------------------------------------------


def update_rescaling(
    group: Group, held: Held, sources: Mapping[str, ThetaSource]
) -> dict[str, LayerState]:
    """Every T_RE steps: Θ in the current basis (Eq. 3.2), averaged (Eq. 3.6).

    In KFAC and TKFAC, Θ is the product of the factors' eigenvalues (Eq. 2.6, 3.1).
    """
    with jax.named_scope("tekfac rescaling"):
        return {path: _new_theta(own, held[path], sources[path]) for path, own in group.items()}


def _new_theta(own: LayerContext, layer: LayerState, source: ThetaSource) -> LayerState:
    if not own.member.measured:
        due = own.clock.product_due(layer) & layer.basis_valid & (layer.factor_weight > 0)
        return own.when(due, functools.partial(_eigenvalue_product, own), layer)

    def average(layer: LayerState) -> LayerState:
        total = own.devices.total(source.rescaling(own.spec, layer))
        new, beta = _mean(total, source.examples), own.options.rescaling_decay
        ok = jnp.isfinite(jnp.sum(total.theta, axis=(-2, -1)) + total.rest)
        is_whole = keeps_all(own.spec, layer.theta.shape)
        return layer._replace(
            theta=_average(ok, beta, layer.theta, new.theta),
            rest=layer.rest if is_whole else _average(ok, beta, layer.rest, new.rest),
            theta_weight=_average(ok, beta, layer.theta_weight, 1.0),
            **_noted(layer, _RESCALING, ok),
        )

    due = own.clock.rescaling_due(layer) & layer.basis_valid & (source.examples != 0)
    return own.when(due, average, layer)


def _eigenvalue_product(own: LayerContext, layer: LayerState) -> LayerState:
    """Θ = δ λ_Φ⊗λ_Ψ. The factors are averaged already, so Θ is not, and its weight is 1."""
    lambda_phi = eigenvalues_in(unit_trace(layer.phi, layer.q_phi), layer.q_phi)
    lambda_psi = eigenvalues_in(unit_trace(layer.psi, layer.q_psi), layer.q_psi)
    product = lambda_phi[..., :, None] * lambda_psi[..., None, :]
    product = expand_lead(layer.delta, product) * product
    theta, rest = with_rest(own.spec, product, lambda: layer.delta)
    rest = jnp.maximum(rest, 0)  # rounding may leave less
    return layer._replace(theta=theta, rest=rest, theta_weight=jnp.ones_like(layer.theta_weight))


# --- averages --------------------------------------------------------------------------------


def _mean(total: T, examples: jax.Array) -> T:
    def mean(x: jax.Array) -> jax.Array:
        return x / examples.astype(x.dtype)

    return jax.tree.map(mean, total)


def _average(ok: jax.Array, beta: Number, old: jax.Array, new: jax.Array | float) -> jax.Array:
    """X ← βX + (1−β)X_new; X unchanged where the new value is not finite."""
    beta = jnp.asarray(beta, old.dtype)
    return jnp.where(expand_lead(ok, old), beta * old + (1 - beta) * new, old)


def _noted(layer: LayerState, kind: int, ok: jax.Array) -> dict[str, jax.Array]:
    """The failure counters after a refresh of one kind."""
    before, failed = layer.failed_in_a_row, jnp.int32(~ok)
    after = (before + 1) * failed[..., None]
    return {
        "failures": layer.failures + failed,
        "failed_in_a_row": jnp.where(jnp.arange(KINDS) == kind, after, before),
    }
