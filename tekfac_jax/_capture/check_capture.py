"""The first tool when in doubt: do the statistics add up to the gradient?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tekfac_jax._capture.value_grad_and_stats import value_grad_and_stats
from tekfac_jax._curvature.by_kind import gradient_of
from tekfac_jax._curvature.chunks import sum_over_examples
from tekfac_jax._layers.matrices import to_matrices
from tekfac_jax._layers.spec import Layers, at_least_float32
from tekfac_jax._layers.types import Params, PyTree


def check_capture(
    loss_fn: Callable[..., PyTree],
    layers: Layers,
    params: Params,
    *args: object,
    has_aux: bool = False,
    **kwargs: object,
) -> dict[str, float]:
    """Compares the sum of the captured per-example gradients with the gradient, layer by layer.

    Σ_n Σ_t a_nt u_ntᵀ is the gradient of a layer whose calls were all captured, whatever the
    network does. A large number means that the layer is also used in a way that the statistics do
    not see. Such a layer should have been listed as not covered: please report it. Runs the
    network once.

    Args:
        loss_fn: as for `value_grad_and_stats`.
        layers: from `find_layers`.
        params: argument 0 of `loss_fn`.
        *args: its other arguments.
        has_aux: whether `loss_fn` returns ``(loss, aux)``.
        **kwargs: keyword arguments of `loss_fn`.

    Returns:
        Layer path -> ‖Σ a uᵀ − gradient‖ / ‖gradient‖ in the Frobenius norm: 0 where both are
        zero, infinite where only the gradient is. About 1e-6 in float32, 1e-2 in bfloat16.

    Raises:
        ValueError: as `value_grad_and_stats`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
        >>> layers = tekfac.find_layers(loss_fn, params, x)
        >>> errors = tekfac.check_capture(loss_fn, layers, params, x)
        >>> errors["~"] < 1e-5
        True
    """

    @jax.jit
    def errors(params: Params) -> dict[str, jax.Array]:
        fn = value_grad_and_stats(loss_fn, layers, has_aux=has_aux)
        _, grads, stats = fn(params, *args, **kwargs)
        gradients = to_matrices(grads, layers)
        # Captures and gradient belong to the same loss, so no scale is undone.
        one = jnp.ones_like(stats.scale)
        found: dict[str, jax.Array] = {}
        for path, spec in layers.items():
            dtype = at_least_float32(spec.dtype)
            captured = sum_over_examples(gradient_of(spec), spec, stats.layers[path], one, dtype)
            expected = gradients[path].astype(dtype)
            difference = jnp.linalg.norm((captured - expected).ravel())
            norm = jnp.linalg.norm(expected.ravel())
            found[path] = jnp.where(difference == 0, 0, difference / norm)
        return found

    return {path: float(error) for path, error in errors(params).items()}
