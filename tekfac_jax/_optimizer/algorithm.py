"""`scale_by_tekfac` and its siblings: Algorithm 1 of the paper, in the paper's order.

F_l ≈ (Q_Φ⊗Q_Ψ) (Θ + λI) (Q_Φ⊗Q_Ψ)ᵀ, with one machine for the family of four and two switches:

|                            | plain factors A, U | trace-restricted factors Φ, Ψ |
|----------------------------|--------------------|-------------------------------|
| eigenvalues of the factors | KFAC               | TKFAC                         |
| Θ measured in their basis  | EKFAC              | TEKFAC                        |
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tekfac_jax._curvature.eigenbasis import precondition
from tekfac_jax._curvature.equal_shapes import by_shape
from tekfac_jax._devices.collectives import Devices, devices_of
from tekfac_jax._devices.mesh import keep_folded, over_mesh
from tekfac_jax._layers.matrices import from_matrices, to_matrices
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.statistics import ReducedStatistics, Statistics
from tekfac_jax._optimizer.batch import read_batch, sampled
from tekfac_jax._optimizer.check_statistics import check_reduced
from tekfac_jax._optimizer.damping import by_factors, layer_dampings
from tekfac_jax._optimizer.family import Member, _meaning, kind_of_factors
from tekfac_jax._optimizer.options import Options
from tekfac_jax._optimizer.precondition import _direction, _has_fallen_back
from tekfac_jax._optimizer.refresh import (
    Tools,
    update_eigenbases,
    update_factors,
    update_layers,
    update_rescaling,
    update_running_rescaling,
)
from tekfac_jax._optimizer.schedule import _next_due, offsets
from tekfac_jax._optimizer.sums import Captured, Source, Summed
from tekfac_jax._state.folding import unfolded
from tekfac_jax._state.initial import initial_state
from tekfac_jax._state.layout import (
    LayerState,
    ScaleByTekfacState,
    debiased,
    is_valid,
    trace_of_theta,
)
from tekfac_jax._state.recognise import check_state_fits


# --- Algorithm 1 -----------------------------------------------------------------------------
def _algorithm(
    layers: Layers, member: Member, options: Options
) -> optax.GradientTransformationExtraArgs:
    offset = dict.fromkeys(layers, 0)
    if options.stagger:
        offset = offsets(
            layers, options.factor_interval, options.eigenbasis_interval, options.rescaling_interval
        )

    def init(params: Any) -> ScaleByTekfacState:
        del params  # the structure comes from `layers`: optax calls init with placeholders
        return initial_state(
            layers,
            options.factor_dtype,
            basis_rank=options.basis_rank,
            max_dim=options.max_dim,
            fold=options.shard_state,
            meaning=_meaning(member, options),
        )

    @functools.cache
    def expected_state() -> Any:
        return jax.eval_shape(init, None)._replace(meaning=_meaning(member, options))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        stats: Statistics | ReducedStatistics | None = None,
        batch_size: int | jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByTekfacState]:
        del params, extra_args
        check_state_fits(state, expected_state())
        gradients = to_matrices(updates, layers)
        running = member.measured and options.rescaling == "running"
        batch = read_batch(
            stats, batch_size, layers, options.axis_name, required=running, plain=member.plain
        )
        if isinstance(stats, ReducedStatistics):
            if options.statistics_examples is not None:
                raise ValueError(
                    "statistics_examples= is for raw statistics: reduced ones are sums over the "
                    "whole batch already; leave one of the two out"
                )
            theta_shapes = None
            if member.measured and not running:
                theta_shapes = {path: layer.theta.shape for path, layer in state.layers.items()}
            check_reduced(stats, layers, kind_of_factors(member, options), theta_shapes)
        refresh = functools.partial(_refresh_curvature, layers, member, options, offset)
        if options.mesh is not None:
            refresh = over_mesh(
                refresh, layers, mesh=options.mesh, mesh_axis=options.mesh_axis,
                shard_state=options.shard_state,
            )  # fmt: skip
        kept = refresh(state.count, state.due, state.layers, stats, batch.summed)
        new = {path: unfolded(layer) for path, layer in kept.items()}
        if running:
            for path, gradient in gradients.items():
                tools = Tools(layers[path], member, options, state.count, Devices(), offset[path])
                new[path] = update_running_rescaling(tools, new[path], gradient, batch)

        theta = {path: debiased(layer.theta, layer.theta_weight) for path, layer in new.items()}
        rest = {path: debiased(layer.rest, layer.theta_weight) for path, layer in new.items()}
        trace = {path: trace_of_theta(layer) for path, layer in new.items()}
        valid = {path: is_valid(layer) for path, layer in new.items()}
        damping = layer_dampings(
            layers, trace, valid,
            damping=options.damping, trace_floor=options.trace_floor,
            damping_scale=options.damping_scale, fc_damping=options.fc_damping,
        )  # fmt: skip
        if options.damping_form == "factored":
            theta = {p: by_factors(theta[p], damping[p], plain=member.plain) for p in layers}
        operands = {
            path: (
                gradient.astype(theta[path].dtype), new[path].q_phi, new[path].q_psi,
                theta[path], rest[path], damping[path],
            )
            for path, gradient in gradients.items()
        }  # fmt: skip
        with jax.named_scope("tekfac precondition"):
            natural = by_shape(precondition, operands)
        fallen_back = {path: _has_fallen_back(layer, options) for path, layer in new.items()}
        directions = {
            path: _direction(
                g, natural[path], trace[path], damping[path], valid[path], fallen_back[path]
            )
            for path, g in gradients.items()
        }
        new = {
            path: keep_folded(layer, kept[path])._replace(
                damping=damping[path], fallen_back=fallen_back[path]
            )
            for path, layer in new.items()
        }

        count = jnp.asarray(optax.safe_increment(state.count))
        return (
            from_matrices(updates, layers, directions),
            ScaleByTekfacState(count, _next_due(count, new, options, offset), new, state.meaning),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _refresh_curvature(
    layers: Layers,
    member: Member,
    options: Options,
    offset: Mapping[str, int],
    step: jax.Array,
    due: jax.Array,
    states: dict[str, LayerState],
    stats: Statistics | ReducedStatistics | None,
    examples: jax.Array,
) -> dict[str, LayerState]:
    """Factors, then the eigenbasis, then Θ in the new basis, each where it is due."""
    del due  # each refresh knows by itself
    axis_name = options.axis_name if options.mesh is None else options.mesh_axis
    # Over a mesh reduced statistics are sums over the whole batch already.
    is_split = options.mesh is None or isinstance(stats, Statistics)
    devices = devices_of(layers, axis_name, split=is_split)
    tools = {
        path: Tools(spec, member, options, step, devices, offset[path])
        for path, spec in layers.items()
    }
    new = dict(states)

    def each(update: Callable[..., LayerState], sources: Mapping[str, Source]) -> None:
        new.update({path: update(tools[path], new[path], sources[path]) for path in layers})

    if isinstance(stats, Statistics):
        captured = {}
        for path, spec in layers.items():
            some, share = sampled(stats.layers[path], spec, options.statistics_examples)
            captured[path] = Captured(some, stats.scale, share * examples)
        return update_layers(tools, new, captured)
    if stats is not None:  # Θ was measured in the old basis
        summed = {path: Summed(reduced, examples) for path, reduced in stats.layers.items()}
        if member.measured:
            each(update_rescaling, summed)
        each(update_factors, summed)
        new.update(update_eigenbases(tools, new))
        if not member.measured:
            each(update_rescaling, summed)
    return new
