"""What the optimizer remembers of each layer, and how to read it."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jnp.ones` and `jnp.eye` untyped.

from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.eigenbasis import trace
from tekfac_jax._layers.types import OptState


class LayerState(NamedTuple):
    """One layer's curvature; i = in[+1] and o = out.

    Layers stacked in one parameter, and the groups of a convolution, have leading axes in front of
    each array (`LayerSpec.lead`); without them the shapes are as below. For an embedding `phi` is
    a vector, (i,), and `q_phi` is None: its basis is the standard one. Averages start at zero and
    carry their own weight, w ← βw + (1−β), by which they are divided when read: the first update
    is an assignment.

    A saved state may lack factors (`without_factors`): `phi` and `psi` are then None. Fields that
    a later version of the layout added default to None, so that pickles of an earlier version
    load; `restore_state` fills them in. No update runs on either.
    """

    phi: jax.Array  # (i, i) average of δΦ; of A in KFAC and EKFAC
    psi: jax.Array  # (o, o) average of δΨ; of U in KFAC and EKFAC
    factor_weight: jax.Array  # () weight of these two averages
    delta: jax.Array  # () δ, debiased: the trace of the layer's Fisher block
    q_phi: jax.Array | None  # (i, i) eigenvectors of Φ in columns; fewer with basis_rank, as in Θ
    q_psi: jax.Array  # (o, o) eigenvectors of Ψ in columns
    basis_valid: jax.Array  # () whether there are eigenvectors yet
    theta: jax.Array  # (i, o) average of Θ in the basis above
    rest: jax.Array  # () average of the trace outside of the kept columns
    theta_weight: jax.Array  # () weight of these two averages
    damping: jax.Array  # () λ of the last step
    failures: jax.Array  # () how often statistics or a decomposition were not finite
    # Failures in a row, up to now, of factors, eigenbasis and Θ; whether the last step only scaled.
    failed_in_a_row: jax.Array = None  # pyright: ignore[reportAssignmentType]  # (3,)
    fallen_back: jax.Array = None  # pyright: ignore[reportAssignmentType]  # ()


class StateKind(NamedTuple):
    """Version of a state's layout, and the options that define what its averages mean.

    Options that are neither here nor visible in the shapes (intervals, decays, damping) may change
    from one run to the next.
    """

    version: jax.Array | int  # () `STATE_VERSION` of the library that made the state
    plain: jax.Array | bool  # () whether the factors are A and U instead of Φ and Ψ
    measured: jax.Array | bool  # () whether Θ is measured, not computed from eigenvalues
    location: jax.Array | bool  # () whether factors="location"
    running: jax.Array | bool  # () whether rescaling="running"


class ScaleByTekfacState(NamedTuple):
    """State of `scale_by_tekfac` and its siblings: arrays only."""

    # pyright: ignore is for NamedTuple's tuple.count, which nobody calls on a state.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # () steps taken
    due: jax.Array  # () whether the next step would use statistics
    layers: dict[str, LayerState]
    meaning: StateKind = None  # pyright: ignore[reportAssignmentType]  # None: version 0


class ClipByKlState(NamedTuple):
    """State of `clip_by_kl`."""

    # pyright: ignore is for NamedTuple's tuple.count, which nobody calls on a state.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # () steps taken
    factor: jax.Array  # () what the last step was multiplied by
    inner_state: OptState


STATE_VERSION = 1  # of the layout; `ADDED` lists what each version added
KINDS = 3  # of refreshes: factors, eigenbasis, Θ

# The version of the layout that added each of these fields.
ADDED = {"failed_in_a_row": 1, "fallen_back": 1, "meaning": 1}


def is_layer_state(node: object) -> TypeGuard[LayerState]:
    """Whether a node of a pytree is the state of one layer."""
    return isinstance(node, LayerState)


def debiased(average: jax.Array, weight: jax.Array) -> jax.Array:
    """An average divided by its weight; zero where nothing has been averaged yet."""
    return average / expand_lead(jnp.where(weight > 0, weight, 1), average)


def trace_of_theta(layer: LayerState) -> jax.Array:
    """The trace of Θ, debiased, including the part outside of the kept columns."""
    return debiased(jnp.sum(layer.theta, axis=(-2, -1)) + layer.rest, layer.theta_weight)


def expand_lead(x: jax.Array, like: jax.Array) -> jax.Array:
    """A (*lead) array with trailing axes, so that it broadcasts against `like` layer by layer."""
    return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def is_valid(layer: LayerState) -> jax.Array:
    """Whether this layer's curvature can precondition a gradient."""
    return layer.basis_valid & (layer.theta_weight > 0) & (jnp.sum(layer.theta, axis=(-2, -1)) > 0)


def unit_trace(factor: jax.Array, q: jax.Array | None) -> jax.Array:
    """A factor divided by its trace; I/dim while it is zero. Without a basis it is a diagonal."""
    total = expand_lead(trace(factor, q), factor)
    dim = factor.shape[-1]
    nothing = (jnp.ones(dim) if q is None else jnp.eye(dim)).astype(factor.dtype) / dim
    return jnp.where(total > 0, factor / jnp.where(total > 0, total, 1), nothing)
