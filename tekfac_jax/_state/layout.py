"""What the optimizer remembers of each layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.eigenbasis import trace


class LayerState(NamedTuple):
    """One layer's curvature; i = in[+1] and o = out.

    Layers that are stacked in one parameter, and the groups of a convolution, have axes of their
    own in front of each array (`LayerSpec.lead`); where there are none the shapes are as below.
    Of an embedding `phi` is a vector, (i,), and `q_phi` is None: its basis is the standard one.
    Averages start at zero and carry their own weight, w ← βw + (1−β), by which they are divided
    when read: the first update is an assignment.

    What a later version of the layout added has a default, so that pickles of an earlier one load;
    `restore_state` fills it in.
    """

    phi: jax.Array  # (i, i) average of δΦ; of A in KFAC and EKFAC
    psi: jax.Array  # (o, o) average of δΨ; of U in KFAC and EKFAC
    factor_weight: jax.Array  # () weight of these two
    delta: jax.Array  # () δ, debiased: the trace of the layer's Fisher block
    q_phi: Any  # (i, i) eigenvectors of Φ in columns; with basis_rank fewer, here and in Θ
    q_psi: jax.Array  # (o, o) eigenvectors of Ψ in columns
    basis_valid: jax.Array  # () whether there are any yet
    theta: jax.Array  # (i, o) average of Θ in the basis above
    rest: jax.Array  # () average of the trace outside of the columns that are kept
    theta_weight: jax.Array  # () weight of these two
    damping: jax.Array  # () λ of the last step
    failures: jax.Array  # () how often statistics or a decomposition were not finite
    failed_in_a_row: Any = None  # (3,) the same of late: factors, eigenbasis, Θ
    fallen_back: Any = None  # () whether the last step scaled the gradient instead


class StateKind(NamedTuple):
    """Version of a state's layout, and what gives its averages their meaning.

    Options that are not among these, nor seen in the shapes (intervals, decays, damping), may
    change from one run to the next.
    """

    version: Any  # () `STATE_VERSION` of the library that made the state
    plain: Any  # () whether the factors are A and U instead of Φ and Ψ
    measured: Any  # () whether Θ is measured instead of the factors' eigenvalues
    location: Any  # () whether factors="location"
    running: Any  # () whether rescaling="running"


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
    inner_state: Any


STATE_VERSION = 1  # of the layout of states; what came with each: `ADDED`
KINDS = 3  # of refreshes: factors, eigenbasis, Θ

# Fields of states that a version of the layout added to those before.
ADDED = {"failed_in_a_row": 1, "fallen_back": 1, "meaning": 1}


def debiased(average: jax.Array, weight: jax.Array) -> jax.Array:
    """An average divided by its weight; zero where nothing was averaged yet."""
    return average / expand_lead(jnp.where(weight > 0, weight, 1), average)


def trace_of_theta(layer: LayerState) -> jax.Array:
    """The trace of Θ, debiased, with what lies outside of the columns that are kept."""
    return debiased(jnp.sum(layer.theta, axis=(-2, -1)) + layer.rest, layer.theta_weight)


def expand_lead(x: jax.Array, like: jax.Array) -> jax.Array:
    """A (*lead) array with axes behind it, so that it meets `like` layer by layer."""
    return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def is_valid(layer: LayerState) -> jax.Array:
    """Whether a gradient can be preconditioned with this layer's curvature."""
    return layer.basis_valid & (layer.theta_weight > 0) & (jnp.sum(layer.theta, axis=(-2, -1)) > 0)


def unit_trace(factor: jax.Array, q: jax.Array | None) -> jax.Array:
    """A factor divided by its trace; I/dim while it is zero. Without a basis: a diagonal."""
    total = expand_lead(trace(factor, q), factor)
    dim = factor.shape[-1]
    nothing = (jnp.ones(dim) if q is None else jnp.eye(dim)).astype(factor.dtype) / dim
    return jnp.where(total > 0, factor / jnp.where(total > 0, total, 1), nothing)
