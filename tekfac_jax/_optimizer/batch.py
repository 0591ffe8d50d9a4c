"""Reads what `update` gets besides the gradient: checks the statistics and sizes their batch."""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `lax.cond`, `jax.eval_shape` and others untyped.

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from tekfac_jax._arguments import check_number
from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._layers.statistics import Capture, ReducedStatistics, StatisticsOfBatch
from tekfac_jax._optimizer.check_statistics import (
    check_bound,
    check_statistics,
    number_captured,
)
from tekfac_jax._optimizer.family import theta_from
from tekfac_jax._optimizer.options import Options
from tekfac_jax._state.family import Member
from tekfac_jax._state.layout import LayerState


class Batch(NamedTuple):
    """How many examples the batch has, and how the gradient is scaled."""

    examples: jax.Array  # number behind the gradient, over all devices
    to_mean: jax.Array  # factor that makes the gradient the mean over examples
    summed: jax.Array  # number of examples behind the statistics, over all devices


def read_batch(
    stats: StatisticsOfBatch | None,
    batch_size: int | jax.Array | None,
    layers: Layers,
    member: Member,
    options: Options,
    states: Mapping[str, LayerState],
) -> Batch:
    """The batch behind the statistics; without statistics, the one that `batch_size` gives.

    With plain factors every captured example must count once. A is computed from inputs alone, so
    it cannot see that the loss masks an example out, or that an example is captured several times,
    once for each column of a Fisher root.

    Raises:
        ValueError: Θ needs a batch size and neither argument gives one; the statistics belong to
            other layers, or are of a kind that this transformation cannot use; `update` does not
            run under `axis_name`.
    """
    # Check what does not depend on the kind of statistics.
    check_bound(options.axis_name)
    if batch_size is not None:
        check_number("batch_size", batch_size, 0, math.inf, "the number of examples", open_low=True)
    needs_size = theta_from(member, options, stats) == "mini-batch" and batch_size is None

    # Without statistics, only a running Θ needs to know the size.
    if stats is None:
        if needs_size:
            raise ValueError(
                'rescaling="running" needs the number of examples in the batch: pass stats= or '
                "batch_size= to update"
            )
        size = jnp.asarray(1 if batch_size is None else batch_size)
        return Batch(size, jnp.asarray(1.0), size)

    # Reduced statistics may come from a part of the batch, so they do not tell the gradient's size.
    check_statistics(stats, layers, member, options, states)
    if isinstance(stats, ReducedStatistics):
        if needs_size:
            raise ValueError(
                'rescaling="running" with reduced statistics needs the size of the gradient\'s '
                "batch: pass batch_size= to update"
            )
        total = _over_devices(stats.examples, options)
        size = total if batch_size is None else jnp.asarray(batch_size)
        return Batch(size, jnp.asarray(1.0), total)

    # Raw statistics come with the gradient, from the same examples.
    captured = number_captured(stats, layers)
    local = jnp.asarray(captured if stats.examples is None else stats.examples)
    local = local.astype(stats.scale.dtype)
    # Captures that were added up, or do not all count, are unusable. NaN makes the refresh fail,
    # and the failure is counted.
    unusable = local != captured if member.plain else local > captured
    if stats.parts is not None:
        unusable |= stats.parts != 1
    local = jnp.where(unusable, jnp.nan, local)
    total = _over_devices(local, options)
    return Batch(total, stats.scale / local, total)


def _over_devices(examples: jax.Array, options: Options) -> jax.Array:
    if options.axis_name is None:
        return examples
    return cast(jax.Array, lax.psum(examples, options.axis_name))


def sampled(
    captures: tuple[Capture, ...], spec: LayerSpec, number: int | None
) -> tuple[tuple[Capture, ...], float]:
    """`number` of the captured examples, evenly spaced, and their share of all examples.

    If filler examples are at the end of the batch, even spacing leaves their share unchanged.
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
