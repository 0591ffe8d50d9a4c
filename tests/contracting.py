"""A contraction over a case's batch, for tests against the oracles."""

import jax
import jax.numpy as jnp
import numpy as np

from tekfac_jax._curvature.chunks import sum_over_examples


def contract(case, contraction):
    """The mean of a contraction over the examples, as the transforms compute it."""
    layers = case.layers()
    _, stats = case.grads_and_stats(layers)
    captures = stats.layers[case.path]

    @jax.jit
    def total(captures, scale):
        return sum_over_examples(contraction, layers[case.path], captures, scale, jnp.float64)

    return jax.tree.map(lambda x: np.asarray(x) / len(case.x), total(captures, stats.scale))
