"""A fresh state: zeros in the shapes that the layers determine."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jnp.zeros` and `jnp.asarray` untyped.

import math
from typing import Literal

import jax
import jax.numpy as jnp

from tekfac_jax._curvature.decomposition import SMALL
from tekfac_jax._layers.spec import Layers, LayerSpec, at_least_float32
from tekfac_jax._layers.types import DType
from tekfac_jax._state.folding import folded
from tekfac_jax._state.layout import KINDS, STATE_VERSION, LayerState, ScaleByTekfacState, StateKind


def state_dtype(spec: LayerSpec, factor_dtype: DType) -> DType:
    """At least float32: factors in half precision lose their small eigenvalues."""
    return at_least_float32(spec.dtype) if factor_dtype is None else factor_dtype


BasisRank = int | float | Literal["auto"] | None
WHOLE = 32  # with basis_rank="auto", sides with at most so many rows are kept whole
_TEKFAC = StateKind(STATE_VERSION, plain=False, measured=True, location=False, running=False)


def kept_columns(
    spec: LayerSpec, basis_rank: BasisRank, max_dim: int | None = None
) -> tuple[int, int]:
    """How many eigenvectors of Φ and of Ψ are kept."""

    def kept(dim: int, auto: float) -> int:
        is_large = max_dim is not None and dim > max_dim
        rule = "auto" if basis_rank is None and is_large else basis_rank
        if rule is None or (rule == "auto" and dim <= WHOLE):
            return dim
        number = auto if isinstance(rule, str) else rule
        rank = math.ceil(number * dim) if isinstance(number, float) else number
        return min(dim, max(rank, SMALL))

    rows = kept(spec.in_dim, 1 / 8) if spec.has_input_basis else spec.in_dim
    return rows, kept(spec.out_dim, 1 / 4)


def initial_state(
    layers: Layers,
    factor_dtype: DType,
    *,
    basis_rank: BasisRank = None,
    max_dim: int | None = None,
    fold: bool = False,
    kind: StateKind = _TEKFAC,
) -> ScaleByTekfacState:
    """Zeros in the shapes that `layers` determines; no curvature is valid yet."""
    states = {
        path: _initial_layer(
            spec, state_dtype(spec, factor_dtype), kept_columns(spec, basis_rank, max_dim)
        )
        for path, spec in layers.items()
    }
    return ScaleByTekfacState(
        count=jnp.zeros((), jnp.int32),
        due=jnp.array(True),
        layers={path: folded(state) if fold else state for path, state in states.items()},
        meaning=StateKind(
            jnp.asarray(kind.version, jnp.int32), *(jnp.asarray(x, bool) for x in kind[1:])
        ),
    )


def _initial_layer(spec: LayerSpec, dtype: DType, columns: tuple[int, int]) -> LayerState:
    """Zeros for one layer, with that many columns kept of its two bases."""
    i, o, (r, p) = spec.in_dim, spec.out_dim, columns

    def zeros(*shape: int, dtype: DType = dtype) -> jax.Array:
        return jnp.zeros((*spec.lead, *shape), dtype)

    return LayerState(
        phi=zeros(i, i) if spec.has_input_basis else zeros(i),
        psi=zeros(o, o),
        factor_weight=zeros(),
        delta=zeros(),
        q_phi=zeros(i, r) if spec.has_input_basis else None,
        q_psi=zeros(o, p),
        basis_valid=zeros(dtype=bool),
        theta=zeros(r, p),
        rest=zeros(),
        theta_weight=zeros(),
        damping=zeros(),
        failures=zeros(dtype=jnp.int32),
        failed_in_a_row=zeros(KINDS, dtype=jnp.int32),
        fallen_back=zeros(dtype=bool),
    )
