"""`scale_by_tekfac` and its siblings: the public transformations, and their arguments."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from tekfac_jax._curvature.decomposition import Method
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.types import AxisName, DType
from tekfac_jax._optimizer.algorithm import algorithm
from tekfac_jax._optimizer.options import (
    Count,
    Damping,
    DampingForm,
    FactorChoice,
    FcDamping,
    Number,
    Options,
    RescalingChoice,
    check_names,
    validate,
)
from tekfac_jax._optimizer.signatures import (
    defaults_of,
    family_signature,
    same_arguments_as,
    unwrapped,
)
from tekfac_jax._state.family import EKFAC, KFAC, TEKFAC, TKFAC, Member
from tekfac_jax._state.initial import BasisRank


@family_signature
def scale_by_tekfac(
    layers: Layers,
    *,
    factor_interval: Count = 50,
    eigenbasis_interval: Count = 50,
    rescaling_interval: Count = 50,
    factor_decay: Number = 0.95,
    rescaling_decay: Number = 0.95,
    statistics_examples: int | None = None,
    stagger: bool = False,
    early_refreshes: bool = False,
    damping: Damping = "auto",
    damping_scale: Number = 1.0,
    trace_floor: Number = 0.01,
    fc_damping: FcDamping = "beta",
    damping_form: DampingForm = "exact",
    factors: FactorChoice = "exact",
    rescaling: RescalingChoice = "exact",
    basis_rank: BasisRank = None,
    max_dim: int | None = None,
    eigenbasis: Method = "auto",
    axis_name: AxisName | None = None,
    mesh: jax.sharding.Mesh | None = None,
    mesh_axis: AxisName | None = None,
    shard_state: bool = False,
    factor_dtype: DType = None,
    max_failures: Count | None = 5,
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

    Args: Refreshes
        factor_interval: T_FIM, steps between updates of Φ and Ψ.
        eigenbasis_interval: T_EIG, steps between eigendecompositions.
        rescaling_interval: T_RE, steps between updates of Θ.
        factor_decay: β of the average of Φ and Ψ, the weight of the old value, in [0, 1).
        rescaling_decay: β of the average of Θ, in [0, 1).
        statistics_examples: factors and Θ from so many of the examples, evenly spread over the batch
            (over each device's part of it), instead of all: cheaper refreshes from noisier
            statistics. Of a batch that was filled up (``examples=``) it
            takes the others for evenly spread, or to fill up the end. Not for reduced statistics.
        stagger: spread the refreshes of different layers over the interval, so that no step is much
            longer than the others; the first step with statistics refreshes all of them. Then
            nearly every step uses statistics.
        early_refreshes: also refresh at steps 1, 2, 4, ... of the first interval, counted from 0:
            six more refreshes with intervals of 50. Without, the first batch's curvature serves
            for a whole interval. Not in the paper; for runs of few intervals (measured in
            `docs/results.md`).

    Args: Damping
        damping: λ. ``"trace"``: max(tr Θ, ϑ) / dim Θ (Eq. 3.5); a positive number: fixed
            (Eq. 3.4); ``"auto"``: trace damping in a network with conv layers, 1e-3 in another.
        damping_scale: multiplies each λ, positive.
        trace_floor: ϑ of Eq. 3.5, not negative.
        fc_damping: ``"beta"``: under trace damping, Dense layers with one position in a network
            with conv layers take the largest λ of these; ``"own"``: their own.
        damping_form: ``"exact"``: λ is added to Θ; ``"factored"``, for KFAC and TKFAC only: a part
            of √λ to each factor, as their papers do (KFAC with π, section 6.3 of Martens and Grosse
            2015; TKFAC √δΦ + √λI and √δΨ + √λI). Not with `basis_rank` or `max_dim`.

    Args: Basis
        factors: ``"exact"``: E[G Gᵀ] and E[Gᵀ G]; ``"location"``: positions (of a convolution,
            say) taken as uncorrelated.
        rescaling: ``"exact"``: Θ from per-example gradients (Eq. 3.2); ``"running"``: from the
            mini-batch gradient alone, which must be the mean over the batch; needs no
            statistics but ``batch_size=`` at update, and is biased.
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

    Args: Devices
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

    Args: Numerics
        factor_dtype: float32 or float64; None: the kernel's dtype, at least float32.
        max_failures: a layer whose statistics or decompositions are not finite keeps its last good
            curvature; after so many failures of one kind in a row it scales its gradient by
            1 / (mean eigenvalue + λ) instead, until a refresh of that kind succeeds
            (`check_state` says so). None: never.

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
    options = locals()  # each argument by its name; nothing else is bound yet
    return _transform(TEKFAC, options.pop("layers"), options)


def _transform(
    member: Member, layers: Layers, options: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    check_names(options)
    every = defaults_of(scale_by_tekfac) | {name: unwrapped(x) for name, x in options.items()}
    return algorithm(layers, member, validate(layers, Options(**every), measured=member.measured))


@same_arguments_as(scale_by_tekfac)
def scale_by_tkfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by trace-restricted Kronecker factors (TKFAC): Θ = δ λ_Φ⊗λ_Ψ.

    Gao et al., arXiv:2011.10741; Eq. 2.8 to 2.10 of arXiv:2011.13609. By default λ is added to Θ,
    with ``damping_form="factored"`` to each factor. Arguments, errors and use: see
    `scale_by_tekfac`.
    """
    return _transform(TKFAC, layers, options)


@same_arguments_as(scale_by_tekfac)
def scale_by_ekfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by eigenvalue-corrected Kronecker factors (EKFAC): Θ in KFAC's eigenbasis.

    George et al. 2018; Eq. 2.7 of arXiv:2011.13609. Arguments, errors and use: see
    `scale_by_tekfac`.
    """
    return _transform(EKFAC, layers, options)


@same_arguments_as(scale_by_tekfac)
def scale_by_kfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by Kronecker factors (KFAC): Θ = λ_A⊗λ_U.

    Martens and Grosse 2015; Grosse and Martens 2016 for convolutions; Eq. 2.4 of
    arXiv:2011.13609. By default λ is added to Θ, with ``damping_form="factored"`` to each factor,
    divided by π. Arguments, errors and use: see `scale_by_tekfac`.
    """
    return _transform(KFAC, layers, options)
