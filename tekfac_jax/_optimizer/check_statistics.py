"""Checks that statistics belong to a transformation; each error names the remedy."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

from collections.abc import Mapping
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tekfac_jax._curvature.normal_form import is_attend
from tekfac_jax._layers.spec import Layers, LayerSpec, call_positions
from tekfac_jax._layers.statistics import (
    Capture,
    Reduced,
    ReducedStatistics,
    Statistics,
    StatisticsOfBatch,
)
from tekfac_jax._layers.types import AxisName, DType
from tekfac_jax._optimizer.family import kind_of_factors, theta_from
from tekfac_jax._optimizer.options import Options
from tekfac_jax._state.family import Member
from tekfac_jax._state.layout import LayerState


def check_bound(axis_name: AxisName | None) -> None:
    """Raises unless the caller is traced under this axis, or under all of several axes."""
    if axis_name is None:
        return
    try:
        lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"update does not run under axis_name={axis_name!r}: call it inside a pmap or "
            "shard_map that has this axis, or leave axis_name out"
        ) from error


def check_statistics(
    stats: StatisticsOfBatch,
    layers: Layers,
    member: Member,
    options: Options,
    states: Mapping[str, LayerState],
) -> None:
    """Raises unless the statistics are of these layers and of the kind that is needed."""
    _check_layers(stats, layers)
    if not isinstance(stats, ReducedStatistics):
        return
    if options.statistics_examples is not None:
        raise ValueError(
            "statistics_examples= is for raw statistics, and these are reduced, already summed "
            'over the batch: leave it out, or capture with mode="raw"'
        )
    factors = kind_of_factors(member, options)
    if stats.factors != factors:
        raise ValueError(
            f'stats hold "{stats.factors}" factors, but this transformation needs "{factors}": '
            f'pass factors="{factors}" to value_grad_and_stats'
        )
    needs_theta = theta_from(member, options, stats) == "old basis"
    for path, spec in layers.items():
        theta_shape = states[path].theta.shape if needs_theta else None
        _check_reduced(path, spec, stats.layers[path], theta_shape)


def _check_reduced(
    path: str, spec: LayerSpec, reduced: Reduced, theta_shape: tuple[int, ...] | None
) -> None:
    """Raises unless a layer's sums have the right shapes; `theta_shape` is None if Θ is unused."""
    if theta_shape is not None and reduced.theta is None:
        raise ValueError(
            "stats lack Θ, which this transformation needs: pass opt_state= to the function "
            'that value_grad_and_stats(..., mode="reduced") returns'
        )
    i, o, lead = spec.in_dim, spec.out_dim, spec.lead
    shapes = {"phi": (*lead, i, i) if spec.has_input_basis else (*lead, i)}
    shapes["psi"] = (*lead, o, o)
    if theta_shape is not None:
        shapes |= {"theta": theta_shape, "rest": lead}
    for name, shape in shapes.items():
        found = getattr(reduced, name)
        if not _is_array(found):
            raise ValueError(
                f"stats of layer {path!r} have a {type(found).__name__} for {name} instead of "
                "an array of floating-point numbers: pass them as value_grad_and_stats returns them"
            )
        if found.shape != shape:
            raise ValueError(
                f"stats of layer {path!r} have {name} of shape {found.shape}, but the layer "
                f"and its state need {shape}: call find_layers again"
            )


def _check_layers(stats: object, layers: Layers) -> None:
    if not isinstance(stats, Statistics | ReducedStatistics):
        raise ValueError(
            f"stats must come from value_grad_and_stats or fisher_stats, got {type(stats).__name__}"
        )
    scalars: list[object] = [stats.examples]
    if isinstance(stats, Statistics):
        optional = [x for x in (stats.examples, stats.parts) if x is not None]
        scalars = [stats.scale, *optional]
    if not all(_is_array(x) and x.shape == () for x in scalars):
        raise ValueError(
            "the sizes and scales in stats must be scalar arrays of real numbers, got "
            f"{scalars}; pass stats as value_grad_and_stats or fisher_stats returns them"
        )
    found: Any = stats.layers  # users build statistics by hand
    named: set[str] = set(cast(Any, found)) if isinstance(found, Mapping) else set()
    if named != set(layers):
        raise ValueError(
            f"stats describe other layers than this transformation: missing "
            f"{sorted(set(layers) - named)}, unknown "
            f"{sorted(named - set(layers), key=str)}. Pass the same `layers` to both."
        )
    kind = Capture if isinstance(stats, Statistics) else Reduced
    for path, own in cast(dict[str, Any], found).items():
        parts = own if isinstance(stats, Statistics) else (own,)
        if not _are_whole(parts, kind):
            raise ValueError(
                f"stats of layer {path!r} must hold floating-point arrays in {kind.__name__}, as "
                f"value_grad_and_stats and fisher_stats return them, got {own!r}"
            )


def _are_whole(parts: Any, kind: type[Capture] | type[Reduced]) -> bool:
    """Whether `parts` is a non-empty tuple of `kind` that holds arrays; Θ may be None."""
    if not (isinstance(parts, tuple) and parts):
        return False
    every = cast(tuple[Any, ...], parts)
    if not all(isinstance(part, kind) for part in every):
        return False
    needed = [field for part in every for field in part[:2]]
    return all(map(_is_array, (*needed, *jax.tree.leaves(every))))


def _is_array(x: object) -> TypeGuard[jax.Array]:
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        return False
    return jnp.issubdtype(cast(DType, x.dtype), jnp.floating)


def number_captured(stats: Statistics, layers: Layers) -> int:
    """Returns how many examples were captured; raises if a capture does not fit its layer."""
    sizes: set[tuple[str, int]] = set()
    for path, spec in layers.items():
        for capture in stats.layers[path]:
            _check_capture(path, spec, capture)
            sizes |= {(path, x.shape[len(spec.stack)]) for x in (capture.a, capture.u)}
    if len({size for _, size in sizes}) != 1:
        raise ValueError(
            f"stats disagree on the batch size: {sorted(sizes)}; pass them as value_grad_and_stats "
            "or fisher_stats returns them"
        )
    return next(iter(sizes))[1]


def _check_capture(path: str, spec: LayerSpec, capture: Capture) -> None:
    remedy = (
        "They come from another model, or find_layers saw other shapes. Call find_layers again."
    )
    # The axes of stacked layers lead every capture.
    stack, features = len(spec.stack), len(spec.bias_shape)
    a, u = capture.a.shape[stack:], capture.u.shape[stack:]
    if {capture.a.shape[:stack], capture.u.shape[:stack]} != {spec.stack}:
        raise ValueError(
            f"stats of layer {path!r} have shapes {capture.a.shape} and {capture.u.shape}, which "
            f"do not begin with the layer's stacked axes {spec.stack}. {remedy}"
        )

    # Which axes of `a` are the input features depends on the kind of layer.
    outputs, inputs = spec.bias_shape, spec.kernel_shape[: spec.contracted]
    if spec.kind == "norm":
        seen: tuple[int, ...] = a
        inputs = u
    elif spec.kind == "embed" and spec.attended and is_attend(*capture):
        seen = a[-1:]
        outputs, inputs = inputs, outputs
    elif spec.kind == "embed":
        seen = a
        inputs = u[:-1]
    elif spec.kind == "conv":
        seen = a[-1:]
        inputs = (inputs[-1] * spec.groups,)
    else:
        seen = tuple(a[axis] for axis in spec.axes if -axis <= len(a))
    if u[-features:] != outputs:
        raise ValueError(
            f"stats of layer {path!r} have outputs of shape {u[-features:]}, but the layer "
            f"has {outputs}. {remedy}"
        )
    if seen != inputs or call_positions(spec, u) < 1:
        raise ValueError(
            f"stats of layer {path!r} have inputs of shape {seen}, but the layer has {inputs}. "
            f"{remedy}"
        )
