"""A fresh state: zeros in the shapes that the layers give."""

import math
from typing import Literal

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
WHOLE = 32  # with basis_rank="auto" a side of so many rows is kept whole
_TEKFAC = StateKind(STATE_VERSION, plain=False, measured=True, location=False, running=False)


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
    factor_dtype: DType,
    *,
    basis_rank: BasisRank = None,
    max_dim: int | None = None,
    fold: bool = False,
    kind: StateKind = _TEKFAC,
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
            jnp.asarray(kind.version, jnp.int32), *(jnp.asarray(x, bool) for x in kind[1:])
        ),
    )
