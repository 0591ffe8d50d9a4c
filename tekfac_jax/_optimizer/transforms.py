"""`scale_by_tekfac` and its siblings: the public transformations, and their arguments."""

from collections.abc import Mapping
from typing import Any

import jax
import optax  # pyright: ignore[reportMissingTypeStubs]

from tekfac_jax._curvature.decomposition import Method
from tekfac_jax._layers.spec import Layers
from tekfac_jax._layers.types import AxisName, DType
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
from tekfac_jax._optimizer.update import transformation
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
    `value_grad_and_stats` or `fisher_stats`. Without it, the step uses the curvature it has.
    Parameters outside `layers`, masked ones, and layers without valid curvature pass unchanged.
    Average gradients over devices before you pass them.

    All members of the family take the same arguments, so you can swap one for another. An argument
    that a member does not need has no effect there: `rescaling` and `rescaling_decay` in KFAC and
    TKFAC, `factors` in KFAC and EKFAC. The exception is ``damping_form="factored"``, an error in
    TEKFAC and EKFAC.

    Args:
        layers: from `find_layers`.

    Args: Refreshes
        factor_interval: T_FIM, steps between updates of Φ and Ψ.
        eigenbasis_interval: T_EIG, steps between eigendecompositions.
        rescaling_interval: T_RE, steps between updates of Θ.
        factor_decay: β of the average of Φ and Ψ, the weight of the old value, in [0, 1).
        rescaling_decay: β of the average of Θ, in [0, 1).
        statistics_examples: how many examples of the batch, or of each device's part of it, factors
            and Θ are computed from. They are evenly spaced. Fewer examples make refreshes cheaper
            and noisier. If ``examples=`` marks some of the batch as filler, the fillers must be
            evenly spread or at the end. Not for reduced statistics. None: all.
        stagger: spreads the refreshes of different layers over the interval, so that no step is
            much longer than the others. The first step with statistics refreshes all layers.
            Nearly every step then uses statistics.
        early_refreshes: also refreshes at steps 1, 2, 4, ... of the first interval, counted from 0:
            six more refreshes with intervals of 50. Otherwise the curvature of the first batch
            serves for a whole interval. Useful in runs of few intervals. Not in the paper;
            `docs/results.md` has the measurements.

    Args: Damping
        damping: λ. ``"trace"``: max(tr Θ, ϑ) / dim Θ (Eq. 3.5). A positive number: that number
            (Eq. 3.4). ``"auto"``: trace damping in a network with conv layers, 1e-3 in any other.
        damping_scale: multiplies each λ, positive.
        trace_floor: ϑ of Eq. 3.5, not negative.
        fc_damping: for Dense layers with one position, under trace damping in a network with conv
            layers. ``"beta"``: the largest λ of the conv layers. ``"own"``: their own λ.
        damping_form: ``"exact"``: λ is added to Θ. ``"factored"``: a multiple of √λ is added to
            each factor, as in the papers on KFAC (with π, section 6.3 of Martens and Grosse 2015)
            and TKFAC (√δΦ + √λI and √δΨ + √λI). For KFAC and TKFAC only, and not with `basis_rank`
            or `max_dim`.

    Args: Basis
        factors: ``"exact"``: E[G Gᵀ] and E[Gᵀ G]. ``"location"``: treats positions (of a
            convolution, say) as uncorrelated.
        rescaling: ``"exact"``: Θ from per-example gradients (Eq. 3.2). ``"running"``: Θ from the
            mini-batch gradient alone, which must be the mean over the batch. This needs
            ``batch_size=`` at update instead of statistics, and is biased.
        basis_rank: how many of the top eigenvectors each side keeps, at least two: a number, a
            share of the side in (0, 1], or ``"auto"`` (an eighth of the inputs and a quarter of the
            outputs; sides of up to 32 are kept whole). The curvature outside them is replaced by
            its mean θ⊥, which preserves the trace. Steps become cheaper and the state smaller.
            None: all.
        max_dim: if `basis_rank` is None, a side with more rows than this keeps its ``"auto"`` share
            of eigenvectors instead of all. Its factor is kept whole. None: no limit.
        eigenbasis: ``"eigh"``: each decomposition starts from scratch. ``"subspace"``: it starts
            from the previous basis, which is kept if it still diagonalises the factor
            (‖ΦQ − QΛ‖ ≤ 0.01 ‖Φ‖), else improved by one or two passes of subspace iteration, else
            computed from scratch. ``"auto"``: ``"subspace"`` on sides of more than 256 rows that
            keep at most half of their eigenvectors, else ``"eigh"`` (on CPU, ``"subspace"`` gains
            nothing for a whole basis).

    Args: Devices
        axis_name: the axis of `pmap` or `shard_map` that splits the batch, or a tuple of axes.
            Statistics are summed over it, and its devices share the eigendecompositions
            (`device_plan`).
        mesh: under `jit` with `NamedSharding`, the mesh whose devices share the work. Without it
            the numbers are the same and each device does all the work.
        mesh_axis: the axis of `mesh` that splits the batch, or a tuple of axes. None: the first.
        shard_state: with `mesh`, divides factors and eigenvectors over the devices of `mesh_axis`
            (see `opt_state_sharding`), so that memory per device falls as their number grows. The
            basis is gathered on each step, and the whole state on steps that refresh something.

    Args: Numerics
        factor_dtype: float32 or float64. None: the kernel's dtype, at least float32.
        max_failures: how many refreshes of one kind may fail in a row. A layer whose statistics or
            decompositions are not finite keeps its last good curvature. After so many failures it
            scales its gradient by 1 / (mean eigenvalue + λ) instead, until a refresh of that kind
            succeeds; `check_state` reports it. None: no limit.

    Returns:
        `optax.GradientTransformationExtraArgs`. Under `jax.vmap` both branches of its conditionals
        are computed.

    Raises:
        ValueError: an argument is out of its range; at update, statistics or gradients do not
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
    options = locals()  # every argument by its name; nothing else is bound yet
    return _transform(TEKFAC, options.pop("layers"), options)


def _transform(
    member: Member, layers: Layers, options: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    check_names(options)
    every = defaults_of(scale_by_tekfac) | {name: unwrapped(x) for name, x in options.items()}
    return transformation(
        layers, member, validate(layers, Options(**every), measured=member.measured)
    )


@same_arguments_as(scale_by_tekfac)
def scale_by_tkfac(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Natural gradient by trace-restricted Kronecker factors (TKFAC): Θ = δ λ_Φ⊗λ_Ψ.

    Gao et al., arXiv:2011.10741; Eq. 2.8 to 2.10 of arXiv:2011.13609. By default λ is added to Θ;
    with ``damping_form="factored"``, √λ is added to each factor. Arguments, errors and use: see
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
    arXiv:2011.13609. By default λ is added to Θ; with ``damping_form="factored"``, √λ is added to
    each factor, balanced by π. Arguments, errors and use: see `scale_by_tekfac`.
    """
    return _transform(KFAC, layers, options)
