"""TODO: _optimizer/precondition"""

import jax
import jax.numpy as jnp

from tekfac_jax._optimizer.options import Options
from tekfac_jax._state.layout import LayerState, expand_lead


def _has_fallen_back(layer: LayerState, options: Options) -> jax.Array:
    if options.max_failures is None:
        return jnp.zeros_like(layer.fallen_back)
    return jnp.any(layer.failed_in_a_row >= options.max_failures, axis=-1)


def _direction(
    g: jax.Array,
    natural: jax.Array,
    trace: jax.Array,
    damping: jax.Array,
    valid: jax.Array,
    fallen_back: jax.Array,
) -> jax.Array:
    """The natural gradient; as long as there is no curvature to rely on, the scaled one, or G."""
    mean = trace / (g.shape[-2] * g.shape[-1])
    scaled = g.astype(trace.dtype) / expand_lead(mean + damping, g)
    best = jnp.where(expand_lead(fallen_back, g), scaled, natural)
    return jnp.where(expand_lead(valid, g), best.astype(g.dtype), g)
