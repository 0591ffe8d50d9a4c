"""One `update`: checks, Algorithm 1 over groups of layers and devices, the new state."""

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
from tekfac_jax._layers.spec import Layers, unchanged
from tekfac_jax._layers.statistics import Statistics, StatisticsOfBatch
from tekfac_jax._layers.types import OptState, Params
from tekfac_jax._optimizer.algorithm import refresh_curvature, take_step
from tekfac_jax._optimizer.batch import read_batch
from tekfac_jax._optimizer.family import state_kind, theta_from
from tekfac_jax._optimizer.options import Options
from tekfac_jax._optimizer.refresh import (
    Held,
    any_due,
    contexts_of,
    groups_of,
    update_rescaling,
)
from tekfac_jax._optimizer.schedule import layer_offsets, next_due
from tekfac_jax._optimizer.sums import FromMiniBatch, sources_of
from tekfac_jax._state.compare import check_state_fits
from tekfac_jax._state.family import Member
from tekfac_jax._state.folding import unfolded
from tekfac_jax._state.initial import initial_state
from tekfac_jax._state.layout import LayerState, ScaleByTekfacState


def transformation(
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
        refresh = functools.partial(_refresh_all, layers, member, options, offsets)
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

        # Take the step of Algorithm 1.
        directions, held = take_step(layers, gradients, held, member, options)

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


def _refresh_all(
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
            refresh_curvature, group, sources=sources, theta=theta_from(member, options, stats)
        )
        new |= cast(Held, lax.cond(any_due(group, own), refresh, unchanged, own))
    return new
