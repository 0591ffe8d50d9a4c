"""The options of the transformations, and the values that each may take."""

import contextlib
import difflib
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tekfac_jax._arguments import LARGEST_INTEGER, as_python, check_choice, check_flag, check_number
from tekfac_jax._curvature.decomposition import Method
from tekfac_jax._devices.mesh import axis_names, check_mesh_axis
from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._layers.types import AxisName, DType
from tekfac_jax._state.initial import BasisRank

Number: TypeAlias = float | jax.Array  # an array where optax injects hyperparameters
Count: TypeAlias = int | jax.Array
Damping = Literal["auto", "trace"] | Number
FcDamping = Literal["beta", "own"]
DampingForm = Literal["exact", "factored"]
FactorChoice = Literal["exact", "location"]
RescalingChoice = Literal["exact", "running"]
_INTERVALS = ("factor_interval", "eigenbasis_interval", "rescaling_interval")
_MAX_FAILURES = (
    "the number of refreshes that may fail in a row before a layer only scales its gradient"
)


class Options(NamedTuple):
    """Options of `scale_by_tekfac` and its siblings; its signature holds the defaults."""

    # refresh
    factor_interval: Count
    eigenbasis_interval: Count
    rescaling_interval: Count
    factor_decay: Number
    rescaling_decay: Number
    statistics_examples: int | None
    stagger: bool
    early_refreshes: bool
    # damping
    damping: Damping
    damping_scale: Number
    trace_floor: Number
    fc_damping: FcDamping
    damping_form: DampingForm
    # basis
    factors: FactorChoice
    rescaling: RescalingChoice
    basis_rank: BasisRank
    max_dim: int | None
    eigenbasis: Method
    # devices
    axis_name: AxisName | None
    mesh: jax.sharding.Mesh | None
    mesh_axis: AxisName | None
    shard_state: bool
    # numerics
    factor_dtype: DType
    max_failures: Count | None


def check_names(options: Mapping[str, object], also: tuple[str, ...] = ()) -> None:
    """Raises a TypeError for an unknown option; the message names the closest known one.

    Args:
        options: the keyword arguments that were passed.
        also: known names that are not fields of `Options`.
    """
    known = (*also, *Options._fields)
    for name in options:
        if name not in Options._fields:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]!r}?" if near else f": choose from {', '.join(known)}"
            raise TypeError(f"there is no argument {name!r}{hint}")


def validate(layers: Layers, options: Options, *, measured: bool) -> Options:
    """Returns the options with dtype and mesh axis filled in; raises a ValueError if one is wrong.

    The message names the argument, its value, the range and the remedy.

    Args:
        layers: from `find_layers`.
        options: the options as passed.
        measured: whether Θ is measured, not the product of the factors' eigenvalues.
    """
    check_layers(layers)
    if not layers:
        raise ValueError("layers is empty: there is nothing to precondition")
    _check_refreshes(options)
    _check_damping(options, measured)
    _check_basis(options)
    return options._replace(
        factor_dtype=_factor_dtype(options.factor_dtype), mesh_axis=_checked_mesh_axis(options)
    )


def _check_refreshes(options: Options) -> None:
    for name in _INTERVALS:
        _check_interval(name, getattr(options, name))
    for name in ("factor_decay", "rescaling_decay"):
        check_number(name, getattr(options, name), 0, 1, "0 keeps only the newest value")
    _check_count(
        "statistics_examples",
        options.statistics_examples,
        "the number of examples that factors and Θ are computed from",
        "all examples",
    )
    check_flag("stagger", options.stagger)
    check_flag("early_refreshes", options.early_refreshes)
    if options.stagger and any(isinstance(getattr(options, n), jax.Array) for n in _INTERVALS):
        raise ValueError(
            "stagger=True plans the refreshes when the transformation is made: pass the intervals "
            "as Python integers, not as arrays or schedules"
        )
    max_failures = as_python(options.max_failures)
    if not isinstance(max_failures, Tracer):
        _check_count("max_failures", max_failures, _MAX_FAILURES, "no limit")


def _check_damping(options: Options, measured: bool) -> None:
    if isinstance(options.damping, str):
        check_choice("damping", options.damping, ("auto", "trace"), "or a positive number")
    else:
        check_number("damping", options.damping, 0, math.inf, "try 1e-3", open_low=True)
    check_number(
        "damping_scale", options.damping_scale, 0, math.inf, "1 leaves λ unscaled", open_low=True
    )
    check_number("trace_floor", options.trace_floor, 0, math.inf, "the paper uses 0.01")
    check_choice("fc_damping", options.fc_damping, get_args(FcDamping))
    check_choice("damping_form", options.damping_form, get_args(DampingForm))
    if options.damping_form == "exact":
        return
    if measured:
        raise ValueError(
            'damping_form="factored" is for KFAC and TKFAC: a measured Θ is not a product of '
            'factors that could be damped; use "exact"'
        )
    for name in ("basis_rank", "max_dim"):
        if getattr(options, name) is not None:
            raise ValueError(
                f'damping_form="factored" needs all eigenvectors, and {name} drops some: '
                "pass only one of the two"
            )


def _check_basis(options: Options) -> None:
    check_choice("factors", options.factors, get_args(FactorChoice))
    check_choice("rescaling", options.rescaling, get_args(RescalingChoice))
    check_choice("eigenbasis", options.eigenbasis, get_args(Method))
    _check_basis_rank(options.basis_rank)
    _check_count(
        "max_dim", options.max_dim, "the largest side that keeps all its eigenvectors", "no limit"
    )


def _check_count(name: str, value: object, meaning: str, none: str) -> None:
    if value is None:
        return
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_INTEGER:
        return
    raise ValueError(
        f"{name} must be {meaning} (an integer, 1 or more and at most {LARGEST_INTEGER:,}), or "
        f"None for {none}, got {value!r}"
    )


def _check_axis_name(value: object) -> None:
    names = cast(tuple[object, ...], axis_names(value))
    if value is not None and not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(
            "axis_name must be the name of a pmap or shard_map axis, a tuple of such names, or "
            f"None, got {value!r}"
        )


def _check_basis_rank(rank: object) -> None:
    if rank is None or (isinstance(rank, str) and rank == "auto"):
        return
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return
    if isinstance(rank, float) and 1e-9 <= rank <= 1:
        return
    raise ValueError(
        'basis_rank must be None (all eigenvectors), "auto", the number to keep on each side '
        f"(an integer, 1 or more), or the share to keep (a float in (0, 1]), got {rank!r}"
    )


def _checked_mesh_axis(options: Options) -> AxisName | None:
    """The mesh axis that splits the batch; raises if the device options contradict each other."""
    check_flag("shard_state", options.shard_state)
    _check_axis_name(options.axis_name)
    for name in ("basis_rank", "max_dim"):
        if getattr(options, name) is not None and options.shard_state:
            raise ValueError(
                f"{name} and shard_state=True cannot be combined: leave one of them out"
            )
    if options.mesh is None:
        for name, default in (("mesh_axis", None), ("shard_state", False)):
            value = getattr(options, name)
            if value is not default:
                raise ValueError(f"{name}={value!r} needs mesh=: pass a mesh, or leave {name} out")
        return None
    if options.axis_name is not None:
        raise ValueError(
            f"axis_name={options.axis_name!r} is for pmap and shard_map, mesh= is for jit "
            "with NamedSharding: pass only one of them"
        )
    return check_mesh_axis(options.mesh, options.mesh_axis, shard_state=options.shard_state)


def _check_interval(name: str, value: object) -> None:
    value = as_python(value)
    if isinstance(value, Tracer):
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_INTEGER:
        raise ValueError(
            f"{name} must be a whole number of steps, 1 or more (1: every step) and at most "
            f"{LARGEST_INTEGER:,}, got {value!r}"
        )


def _factor_dtype(dtype: DType) -> DType:
    if dtype is None:
        return None
    known: DType = None
    if isinstance(dtype, str | type | np.dtype):  # an array has a dtype but is not one
        with contextlib.suppress(TypeError):
            known = cast(DType, jnp.dtype(dtype))
    if known is None or known not in (jnp.dtype("float32"), jnp.dtype("float64")):
        raise ValueError(
            f"factor_dtype must be float32 or float64, got {dtype!r}: half precision "
            "loses the small eigenvalues of a factor. Parameters and activations may still "
            "be in half precision"
        )
    return known
