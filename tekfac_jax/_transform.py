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

from tekfac_jax._batch import check_reduced, read_batch, sampled
from tekfac_jax._compatibility import check_state_fits
from tekfac_jax._damping import Damping, DampingForm, FcDamping, by_factors, layer_dampings
from tekfac_jax._decomposition import Method
from tekfac_jax._devices import Devices, devices_of
from tekfac_jax._eigenbasis import precondition
from tekfac_jax._layers import Layers, Statistics
from tekfac_jax._options import (
    FactorChoice,
    Number,
    Options,
    RescalingChoice,
    check_names,
    same_arguments_as,
    validate,
)
from tekfac_jax._pytrees import to_matrices, from_matrices
from tekfac_jax._reduced import ReducedStatistics
from tekfac_jax._refresh import (
    Member,
    Tools,
    kind_of_factors,
    update_eigenbases,
    update_factors,
    update_layers,
    update_rescaling,
    update_running_rescaling,
)
from tekfac_jax._schedule import is_due, offsets
from tekfac_jax._sharding import keep_folded, over_mesh
from tekfac_jax._sources import Captured, Source, Summed
from tekfac_jax._stacked import by_shape
from tekfac_jax._state import (
    STATE_VERSION,
    BasisRank,
    LayerState,
    StateKind,
    ScaleByTekfacState,
    debiased,
    expand_lead,
    initial_state,
    is_valid,
    trace_of_theta,
    unfolded,
)

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
            refresh = over_mesh(refresh, layers, options)
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


def _meaning(member: Member, options: Options) -> StateKind:
    location, running = options.factors == "location", options.rescaling == "running"
    return StateKind(STATE_VERSION, member.plain, member.measured, location, running)


def _has_fallen_back(layer: LayerState, options: Options) -> jax.Array:
    if options.max_failures is None:
        return jnp.zeros_like(layer.fallen_back)
    return jnp.any(layer.failed_in_a_row >= options.max_failures, axis=-1)


def _direction(
    g: jax.Array,
    natural: jax.Array,
    trace: jax.Array,
    damping: jax.Array,
    valid: jax.Array,
    fallen_back: jax.Array,
) -> jax.Array:
    """The natural gradient; as long as there is no curvature to rely on, the scaled one, or G."""
    mean = trace / (g.shape[-2] * g.shape[-1])
    scaled = g.astype(trace.dtype) / expand_lead(mean + damping, g)
    best = jnp.where(expand_lead(fallen_back, g), scaled, natural)
    return jnp.where(expand_lead(valid, g), best.astype(g.dtype), g)


def _next_due(
    count: jax.Array, layers: dict[str, LayerState], options: Options, offset: Mapping[str, int]
) -> jax.Array:
    intervals = (options.factor_interval, options.eigenbasis_interval, options.rescaling_interval)
    own = jnp.asarray(sorted(set(offset.values())), count.dtype)
    early = options.early_refreshes
    due = [jnp.any(is_due(count, own, interval, early=early)) for interval in intervals]
    missing = [
        jnp.any(~layer.basis_valid | (layer.theta_weight == 0) | (layer.factor_weight == 0))
        for layer in layers.values()
    ]
    return jnp.any(jnp.stack([*due, *missing]))


# --- public factories ------------------------------------------------------------------------


def scale_by_tekfac(
    layers: Layers,
    *,
    factor_interval: Number = 50,
    eigenbasis_interval: Number = 50,
    rescaling_interval: Number = 50,
    factor_decay: Number = 0.95,
    rescaling_decay: Number = 0.95,
    damping: Damping = "auto",
    trace_floor: Number = 0.01,
    damping_scale: Number = 1.0,
    fc_damping: FcDamping = "beta",
    damping_form: DampingForm = "exact",
    factors: FactorChoice = "exact",
    rescaling: RescalingChoice = "exact",
    statistics_examples: int | None = None,
    basis_rank: BasisRank = None,
    max_dim: int | None = None,
    eigenbasis: Method = "auto",
    stagger: bool = False,
    early_refreshes: bool = False,
    max_failures: Number | None = 5,
    axis_name: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    mesh_axis: Any = None,
    shard_state: bool = False,
    factor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by trace-restricted, eigenvalue-corrected Kronecker factors (TEKFAC).

    Turns the gradient G of each captured layer into Q_Φ [(Q_Φᵀ G Q_Ψ) / (Θ + λ)] Q_Ψᵀ
    (Algorithm 1 and Eq. 3.9 of Gao et al., arXiv:2011.13609). `update` takes ``stats=`` from
    `value_grad_and_stats` or `fisher_stats`; without, it preconditions with the curvature held.
    Parameters outside `layers`, masked ones, and layers without valid curvature pass unchanged.
    Gradients are expected to be averaged over devices already.

    The whole family takes the same arguments, so that one can be swapped for another; what a
    sibling has no use for (`rescaling` and `rescaling_decay` in KFAC and TKFAC, `factors` in
    KFAC and EKFAC) has no effect there. Only ``damping_form="factored"`` is an error where a Θ is
    measured.

    Args:
        layers: from `find_layers`.
        factor_interval: T_FIM, steps between updates of Φ and Ψ.
        eigenbasis_interval: T_EIG, steps between eigendecompositions.
        rescaling_interval: T_RE, steps between updates of Θ.
        factor_decay: β of the average of Φ and Ψ, the weight of the old value, in [0, 1).
        rescaling_decay: β of the average of Θ, in [0, 1).
        damping: λ. ``"trace"``: max(tr Θ, ϑ) / dim Θ (Eq. 3.5); a positive number: fixed
            (Eq. 3.4); ``"auto"``: trace damping in a network with conv layers, 1e-3 in another.
        trace_floor: ϑ of Eq. 3.5, not negative.
        damping_scale: multiplies each λ, positive.
        fc_damping: ``"beta"``: under trace damping, Dense layers with one position in a network
            with conv layers take the largest λ of these; ``"own"``: their own.
        damping_form: ``"exact"``: λ is added to Θ; ``"factored"``, for KFAC and TKFAC only: a part
            of √λ to each factor, as their papers do (KFAC with π, section 6.3 of Martens and Grosse
            2015; TKFAC √δΦ + √λI and √δΨ + √λI). Not with `basis_rank` or `max_dim`.
        factors: ``"exact"``: E[G Gᵀ] and E[Gᵀ G]; ``"location"``: positions (of a convolution,
            say) taken as uncorrelated.
        rescaling: ``"exact"``: Θ from per-example gradients (Eq. 3.2); ``"running"``: from the
            mini-batch gradient alone, which must be the mean over the batch; needs no
            statistics but ``batch_size=`` at update, and is biased.
        statistics_examples: factors and Θ from so many of the examples, evenly spread over the batch
            (over each device's part of it), instead of all: cheaper refreshes from noisier
            statistics. Of a batch that was filled up (``examples=``) it
            takes the others for evenly spread, or to fill up the end. Not for reduced statistics.
        basis_rank: how many eigenvectors are kept on each side, the top ones, at least two: a
            number, a share of the side in (0, 1], or ``"auto"``: an eighth of the inputs and a
            quarter of the outputs, and sides of up to 32 as a whole. The curvature outside of them
            is replaced by its mean θ⊥, so that the trace stays; a step costs less, and the state
            is smaller. None: all.
        max_dim: with `basis_rank` None, a side with more rows keeps ``"auto"`` of its eigenvectors
            instead of all; None: no limit. Its factor is kept whole.
        eigenbasis: ``"eigh"``: each eigendecomposition from scratch; ``"subspace"``: from the basis
            before, which is kept where it still diagonalises its factor (‖ΦQ − QΛ‖ ≤ 0.01 ‖Φ‖),
            else improved by one or two passes of subspace iteration, and found from scratch where
            these do not suffice; ``"auto"``: the latter where at most half of the eigenvectors of
            a side of more than 256 are kept (of whole bases it gains nothing on CPU).
        stagger: spread the refreshes of different layers over the interval, so that no step is much
            longer than the others; the first step with statistics refreshes all of them. Then
            nearly every step uses statistics.
        early_refreshes: also refresh at steps 1, 2, 4, ... of the first interval, counted from 0:
            six more refreshes with intervals of 50. Without, the first batch's curvature serves
            for a whole interval. Not in the paper; for runs of few intervals (measured in
            `docs/results.md`).
        max_failures: a layer whose statistics or decompositions are not finite keeps its last good
            curvature; after so many failures of one kind in a row it scales its gradient by
            1 / (mean eigenvalue + λ) instead, until a refresh of that kind succeeds
            (`check_state` says so). None: never.
        axis_name: name of the `pmap` or `shard_map` axis over which the batch is split, or a tuple
            of names. Sums are added up over it and eigendecompositions shared out
            (`device_plan`).
        mesh: under `jit` with `NamedSharding`: the mesh whose devices share the work; without, the
            numbers are the same, and each device does all of it.
        mesh_axis: the axis of `mesh` over which the batch is split, or a tuple of axes; None: the
            first.
        shard_state: with `mesh`, divide factors and eigenvectors over the devices of `mesh_axis`
            (see `opt_state_sharding`): the memory of a device falls with their number, the basis
            is gathered in each step, and all of it where something is refreshed.
        factor_dtype: float32 or float64; None: the kernel's dtype, at least float32.

    Returns:
        `optax.GradientTransformationExtraArgs`. Under `jax.vmap` its conditionals compute both
        branches.

    Raises:
        ValueError: an argument out of its range; at update: statistics or gradients that do not
            belong to `layers`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.mean(jnp.sum((model.apply({"params": params}, x) - 1) ** 2, axis=-1))
        >>> layers = tekfac.find_layers(loss_fn, params, x)
        >>> tx = optax.chain(tekfac.scale_by_tekfac(layers), optax.scale(-1e-2))
        >>> opt_state = tx.init(params)
        >>> loss, grads, stats = tekfac.value_grad_and_stats(loss_fn, layers)(params, x)
        >>> updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
        >>> bool(loss_fn(optax.apply_updates(params, updates), x) < loss)
        True
    """
    options = Options(
        factor_interval, eigenbasis_interval, rescaling_interval, factor_decay, rescaling_decay,
        damping, trace_floor, damping_scale, fc_damping, damping_form, factors, rescaling,
        statistics_examples, basis_rank, max_dim, eigenbasis, stagger, early_refreshes, max_failures,
        axis_name, mesh, mesh_axis, shard_state, factor_dtype,
    )  # fmt: skip
    return _algorithm(
        layers, Member(plain=False, measured=True), validate(layers, options, measured=True)
    )


def _sibling(
    layers: Layers, options: Mapping[str, Any], *, plain: bool, measured: bool
) -> optax.GradientTransformationExtraArgs:
    check_names(options)
    valid = validate(layers, Options(**options), measured=measured)
    return _algorithm(layers, Member(plain, measured), valid)


@same_arguments_as(scale_by_tekfac)
def scale_by_tkfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by trace-restricted Kronecker factors (TKFAC): Θ = δ λ_Φ⊗λ_Ψ.

    Gao et al., arXiv:2011.10741; Eq. 2.8 to 2.10 of arXiv:2011.13609. By default λ is added to Θ,
    with ``damping_form="factored"`` to each factor. Arguments, errors and use: see
    `scale_by_tekfac`.
    """
    return _sibling(layers, options, plain=False, measured=False)


@same_arguments_as(scale_by_tekfac)
def scale_by_ekfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by eigenvalue-corrected Kronecker factors (EKFAC): Θ in KFAC's eigenbasis.

    George et al. 2018; Eq. 2.7 of arXiv:2011.13609. Arguments, errors and use: see
    `scale_by_tekfac`.
    """
    return _sibling(layers, options, plain=True, measured=True)


@same_arguments_as(scale_by_tekfac)
def scale_by_kfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by Kronecker factors (KFAC): Θ = λ_A⊗λ_U.

    Martens and Grosse 2015; Grosse and Martens 2016 for convolutions; Eq. 2.4 of
    arXiv:2011.13609. By default λ is added to Θ, with ``damping_form="factored"`` to each factor,
    divided by π. Arguments, errors and use: see `scale_by_tekfac`.
    """
    return _sibling(layers, options, plain=True, measured=False)
