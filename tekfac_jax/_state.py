"""What the optimizer remembers of each layer."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from tekfac_jax._decomposition import SMALL
from tekfac_jax._eigenbasis import trace
from tekfac_jax._folding import fold, unfold
from tekfac_jax._layers import Layers, LayerSpec, at_least_float32


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


def state_dtype(spec: LayerSpec, factor_dtype: Any) -> Any:
    """At least float32: factors in half precision lose their small eigenvalues."""
    return at_least_float32(spec.dtype) if factor_dtype is None else factor_dtype


BasisRank = int | float | Literal["auto"] | None
STATE_VERSION = 1  # of the layout of states; what came with each: `ADDED`
KINDS = 3  # of refreshes: factors, eigenbasis, Θ
WHOLE = 32  # with basis_rank="auto" a side of so many rows is kept whole

# Fields of states that a version of the layout added to those before.
ADDED = {"failed_in_a_row": 1, "fallen_back": 1, "meaning": 1}

_TEKFAC = StateKind(STATE_VERSION, plain=False, measured=True, location=False, running=False)

# The square matrices of a layer, the bulk of its state; they may be folded (`_folding`).
SQUARES = ("phi", "psi", "q_phi", "q_psi")


def is_folded(layer: LayerState, name: str) -> bool:
    """Whether that one of `SQUARES` is folded. Of an embedding Φ is a vector, and never is."""
    return name in _square_names(layer) and getattr(layer, name).ndim == 1


def _square_shape(layer: LayerState, name: str) -> tuple[int, ...]:
    """What Θ, which is never folded, says of a matrix's shape."""
    *lead, i, o = layer.theta.shape
    dim = i if name.endswith("phi") else o
    return (*lead, dim, dim)


def unfolded(layer: LayerState) -> LayerState:
    """The layer with all its matrices as such."""
    squares = {
        name: unfold(getattr(layer, name), _square_shape(layer, name))
        for name in SQUARES
        if is_folded(layer, name)
    }
    return layer._replace(**squares)


def folded(layer: LayerState) -> LayerState:
    """The layer with its matrices folded."""
    squares = {name: fold(getattr(layer, name)) for name in _square_names(layer)}
    return layer._replace(**squares)


def _square_names(layer: LayerState) -> tuple[str, ...]:
    return ("psi", "q_psi") if layer.q_phi is None else SQUARES


def kept_columns(
    spec: LayerSpec, basis_rank: BasisRank, max_dim: int | None = None
) -> tuple[int, int]:
    """How many eigenvectors are kept of Φ and of Ψ."""

    def kept(dim: int, auto: float) -> int:
        is_large = max_dim is not None and dim > max_dim
        rule = "auto" if basis_rank is None and is_large else basis_rank
        if rule is None or (rule == "auto" and dim <= WHOLE):
            return dim
        share = auto if isinstance(rule, str) else rule
        rank = math.ceil(share * dim) if isinstance(share, float) else share
        return min(dim, max(rank, SMALL))

    rows = kept(spec.in_dim, 1 / 8) if spec.has_input_basis else spec.in_dim
    return rows, kept(spec.out_dim, 1 / 4)


def initial_state(
    layers: Layers,
    factor_dtype: Any,
    *,
    basis_rank: BasisRank = None,
    max_dim: int | None = None,
    fold: bool = False,
    meaning: StateKind = _TEKFAC,
) -> ScaleByTekfacState:
    """Zeros in the shapes that `layers` gives; no curvature is valid yet."""
    as_kept = folded if fold else lambda layer: layer

    def layer(spec: LayerSpec) -> LayerState:
        i, o, dtype = spec.in_dim, spec.out_dim, state_dtype(spec, factor_dtype)
        lead, (r, p) = spec.lead, kept_columns(spec, basis_rank, max_dim)
        shapes: dict[str, tuple[int, ...]] = dict(
            phi=(i, i), psi=(o, o), factor_weight=(), delta=(), q_phi=(i, r), q_psi=(o, p),
            basis_valid=(), theta=(r, p), rest=(), theta_weight=(), damping=(), failures=(),
            failed_in_a_row=(KINDS,), fallen_back=(),
        )  # fmt: skip
        if not spec.has_input_basis:
            shapes["phi"] = (i,)
        dtypes = dict(
            basis_valid=bool, failures=jnp.int32, failed_in_a_row=jnp.int32, fallen_back=bool
        )
        state = LayerState(
            **{
                name: jnp.zeros((*lead, *shape), dtypes.get(name, dtype))
                for name, shape in shapes.items()
            }
        )
        if not spec.has_input_basis:
            state = state._replace(q_phi=None)
        return as_kept(state)

    return ScaleByTekfacState(
        count=jnp.zeros((), jnp.int32),
        due=jnp.array(True),
        layers={path: layer(spec) for path, spec in layers.items()},
        meaning=StateKind(
            jnp.asarray(meaning.version, jnp.int32), *(jnp.asarray(x, bool) for x in meaning[1:])
        ),
    )


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
