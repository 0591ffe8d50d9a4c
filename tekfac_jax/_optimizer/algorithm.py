"""Algorithm 1 of the paper (Gao et al., arXiv:2011.13609), in the paper's order.

`_refresh_group` holds its three refreshes (factors, eigenbasis, Θ). `update`, inside `algorithm`,
takes the step: it solves with F_l ≈ (Q_Φ⊗Q_Ψ) (Θ + λI) (Q_Φ⊗Q_Ψ)ᵀ (Eq. 3.4).

Two switches cover the family of four:

|                                | plain factors A, U | trace-restricted factors Φ, Ψ |
|--------------------------------|--------------------|-------------------------------|
| eigenvalues of the factors     | KFAC               | TKFAC                         |
| Θ measured in their eigenbasis | EKFAC              | TEKFAC                        |
"""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import functools
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax  # pyright: ignore[reportMissingTypeStubs]
from jax import lax

from tekfac_jax._devices.collectives import Devices, devices_of
from tekfac_jax._devices.mesh import keep_folded, over_mesh
from tekfac_jax._layers.matrices import from_matrices, to_matrices
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.statistics import Statistics, StatisticsOfBatch
from tekfac_jax._layers.types import OptState, Params
from tekfac_jax._optimizer.batch import read_batch
from tekfac_jax._optimizer.damping import layer_dampings
from tekfac_jax._optimizer.family import ThetaFrom, state_kind, theta_from
from tekfac_jax._optimizer.options import Options
from tekfac_jax._optimizer.precondition import has_fallen_back, precondition
from tekfac_jax._optimizer.refresh import (
    Group,
    Held,
    any_due,
    contexts_of,
    form_gradients_once,
    groups_of,
    unchanged,
    update_eigenbases,
    update_factors,
    update_rescaling,
)
from tekfac_jax._optimizer.schedule import layer_offsets, next_due
from tekfac_jax._optimizer.spectrum import spectrum_of
from tekfac_jax._optimizer.sums import FromMiniBatch, Source, sources_of
from tekfac_jax._state.compare import check_state_fits
from tekfac_jax._state.family import Member
from tekfac_jax._state.folding import unfolded
from tekfac_jax._state.initial import initial_state
from tekfac_jax._state.layout import LayerState, ScaleByTekfacState


def algorithm(
    layers: Layers, member: Member, options: Options
) -> optax.GradientTransformationExtraArgs:
    """The optax transformation for one member of the family."""
    offsets = layer_offsets(layers, options)
    kind = state_kind(member, options)

    def init(params: Params) -> ScaleByTekfacState:
        del params  # optax may pass placeholders, so the structure comes from `layers`
        return initial_state(
            layers,
            options.factor_dtype,
            basis_rank=options.basis_rank,
            max_dim=options.max_dim,
            fold=options.shard_state,
            kind=kind,
        )

    @functools.cache
    def expected_state() -> ScaleByTekfacState:
        return jax.eval_shape(init, None)._replace(meaning=kind)

    def update(
        updates: Params,
        state: OptState,
        params: Params = None,
        *,
        stats: StatisticsOfBatch | None = None,
        batch_size: int | jax.Array | None = None,
        **extra_args: object,
    ) -> tuple[Params, ScaleByTekfacState]:
        del params, extra_args
        # Check the inputs first: here an error can still name the layer.
        check_state_fits(state, expected_state())
        gradients = to_matrices(updates, layers)
        batch = read_batch(stats, batch_size, layers, member, options, state.layers)

        # Refresh the curvature where it is due: Φ and Ψ, then Q_Φ and Q_Ψ, then Θ.
        refresh = functools.partial(_refresh, layers, member, options, offsets)
        # `validate` sets both or neither; the type checker does not know that.
        if options.mesh is not None and options.mesh_axis is not None:
            refresh = over_mesh(
                refresh, layers, due=state.due, mesh=options.mesh, mesh_axis=options.mesh_axis,
                shard_state=options.shard_state,
            )  # fmt: skip
        kept = refresh(state.count, state.layers, stats, batch.summed)
        held = {path: unfolded(layer) for path, layer in kept.items()}
        # With rescaling="running", Θ comes from the gradient itself and needs no statistics.
        if theta_from(member, options, stats) == "mini-batch":
            contexts = contexts_of(layers, member, options, offsets, state.count, Devices())
            sources = {path: FromMiniBatch(g, batch) for path, g in gradients.items()}
            held |= update_rescaling({path: contexts[path] for path in gradients}, held, sources)

        # Take the step: the damped curvature is diagonal in the eigenbasis, so it is a division.
        spectra = {path: spectrum_of(layer) for path, layer in held.items()}
        damping = layer_dampings(layers, spectra, options)  # λ                     Eq. 3.4, 3.5
        held = {
            path: layer._replace(damping=damping[path], fallen_back=has_fallen_back(layer, options))
            for path, layer in held.items()
        }
        directions = precondition(gradients, held, spectra, member, options)  # Eq. 3.9, less −η

        # Store the new state, with matrices folded again where they were (shard_state=True).
        new = {path: keep_folded(layer, kept[path]) for path, layer in held.items()}
        count = jnp.asarray(optax.safe_increment(state.count))
        due = next_due(count, new, options, offsets)
        return (
            from_matrices(updates, layers, directions),
            ScaleByTekfacState(count, due, new, state.meaning),
        )

    # optax's type for a state has no None, but an embedding's Q_Φ is None.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _refresh(
    layers: Layers,
    member: Member,
    options: Options,
    offsets: Mapping[str, int],
    step: jax.Array,
    held: Held,
    stats: StatisticsOfBatch | None,
    examples: jax.Array,
) -> dict[str, LayerState]:
    """Refreshes the curvature of all layers, group by group, from this device's statistics."""
    new = dict(held)
    if stats is None:  # nothing to refresh from: the curvature stays as it is
        return new

    # Sum over devices only what is still split between them. Over a mesh, reduced statistics are
    # already sums over the whole batch.
    axis_name = options.axis_name if options.mesh is None else options.mesh_axis
    is_split = options.mesh is None or isinstance(stats, Statistics)
    devices = devices_of(layers, axis_name, split=is_split)
    contexts = contexts_of(layers, member, options, offsets, step, devices)
    sources = sources_of(stats, layers, options, examples)

    # A group with nothing due costs nothing.
    for group in groups_of(contexts):
        own = {path: held[path] for path in group}
        refresh = functools.partial(
            _refresh_group, group, sources=sources, theta=theta_from(member, options, stats)
        )
        new |= cast(Held, lax.cond(any_due(group, own), refresh, unchanged, own))
    return new


def _refresh_group(
    group: Group, held: Held, *, sources: Mapping[str, Source], theta: ThetaFrom
) -> Held:
    """The refreshes of Algorithm 1, for layers that are refreshed together."""
    sources = form_gradients_once(group, held, sources)
    if theta == "old basis":  # reduced statistics hold Θ in the basis from before this step
        held = update_rescaling(group, held, sources)
    held = update_factors(group, held, sources)  # every T_FIM: δ, Φ, Ψ           Eq. 2.10, 3.7, 3.8
    held = update_eigenbases(group, held)  # every T_EIG: Q_Φ, Q_Ψ; Θ is transported        Eq. 3.1
    if theta == "new basis":
        held = update_rescaling(group, held, sources)  # every T_RE: Θ               Eq. 3.2, 3.6
    return held
