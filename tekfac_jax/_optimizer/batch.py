"""What comes into an update besides the gradient: the statistics, checked, and their batch."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._arguments import check_number
from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._layers.statistics import Capture, ReducedStatistics, Statistics
from tekfac_jax._optimizer.check_statistics import _check_bound, _check_captures, _check_layers

Given = Statistics | ReducedStatistics


class Batch(NamedTuple):
    """How many examples there are, and how the gradient is scaled."""

    examples: jax.Array  # that the gradient is of, over all devices
    to_mean: jax.Array  # what the gradient is multiplied by to be the mean over the examples
    summed: jax.Array  # examples that the statistics are of, over all devices


def read_batch(
    stats: Given | None,
    batch_size: int | jax.Array | None,
    layers: Layers,
    axis_name: Any,
    *,
    required: bool,
    plain: bool,
) -> Batch:
    """The batch that the statistics are of, or, without statistics, that `batch_size` gives.

    With `plain` factors every capture counts, or none: their A does not see the loss, and so not
    which examples are multiplied by zero, nor that one stands for several columns of a Fisher root.

    Raises:
        ValueError: `required` and neither is given; statistics of other layers; `axis_name` is no
            axis that this runs under.
    """
    _check_bound(axis_name)
    if batch_size is not None:
        check_number("batch_size", batch_size, 0, math.inf, "examples in the batch", open_low=True)
    if stats is None:
        if batch_size is None and required:
            raise ValueError(
                'rescaling="running" needs the number of examples in the batch: pass stats=, or '
                "batch_size= to update"
            )
        size = jnp.asarray(1 if batch_size is None else batch_size)
        return Batch(size, jnp.asarray(1.0), size)
    _check_layers(stats, layers)
    if isinstance(stats, ReducedStatistics):
        if required and batch_size is None:
            raise ValueError(
                'rescaling="running" with reduced statistics needs the size of the batch that the '
                "gradient is of: pass batch_size= to update"
            )
        total = stats.examples if axis_name is None else lax.psum(stats.examples, axis_name)
        size = total if batch_size is None else jnp.asarray(batch_size)
        return Batch(size, jnp.asarray(1.0), total)
    captured = _check_captures(stats, layers)
    local = jnp.asarray(captured if stats.examples is None else stats.examples)
    local = local.astype(stats.scale.dtype)
    # Not a number, so that no curvature comes of what was added up; `failures` counts it.
    unusable = local != captured if plain else local > captured
    if stats.parts is not None:
        unusable |= stats.parts != 1
    local = jnp.where(unusable, jnp.nan, local)
    total = local if axis_name is None else lax.psum(local, axis_name)
    return Batch(total, stats.scale / local, total)


def sampled(
    captures: tuple[Capture, ...], spec: LayerSpec, number: int | None
) -> tuple[tuple[Capture, ...], float]:
    """So many of the captured examples, evenly spread, and which share of all they are.

    Evenly, so that of a batch that is filled up at its end the same share counts.
    """
    axis = len(spec.stack)
    captured = captures[0].u.shape[axis]
    if number is None or number >= captured:
        return captures, 1.0
    stride = captured // number
    limit = (number - 1) * stride + 1

    def some(x: jax.Array) -> jax.Array:
        return lax.slice_in_dim(x, 0, limit, stride, axis)

    return jax.tree.map(some, captures), number / captured
