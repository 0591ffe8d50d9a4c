"""The loss with slots, for users who call `jax.grad` themselves."""

from collections.abc import Callable

import jax
import numpy as np

from tekfac_jax._arguments import check_function
from tekfac_jax._capture.plan import Captures, batch_plan
from tekfac_jax._layers.paths import flattened
from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._layers.types import Params, PyTree


def tap(loss_fn: Callable[..., PyTree], layers: Layers) -> Callable[..., PyTree]:
    """The loss with slots: differentiate it with respect to argument 1 to get the captures.

    The building block of `value_grad_and_stats`, for users who call `jax.grad` themselves. Wrap the
    captures as ``Statistics(captures, scale)``, where `scale` is what the loss was divided by.

    Args:
        loss_fn: function of (params, *args, **kwargs).
        layers: from `find_layers`.

    Returns:
        Function of (params, slots, *args, **kwargs) that returns what `loss_fn` returns.

    Raises:
        ValueError: when called: a layer of `layers` is missing, is used differently or has another
            shape; there is a layer or a parameter that `find_layers` did not see; or batch sizes
            disagree.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.sum(model.apply({"params": params}, x) ** 2)
        >>> layers = tekfac.find_layers(loss_fn, params, x)
        >>> slots = tekfac.make_slots(loss_fn, layers, params, x)
        >>> captures = jax.grad(tekfac.tap(loss_fn, layers), argnums=1)(params, slots, x)
        >>> captures["~"][0].a.shape
        (8, 5)
    """
    check_layers(layers)
    check_function("loss_fn", loss_fn)

    def tapped(params: Params, slots: Captures, *args: object, **kwargs: object) -> PyTree:
        plan = batch_plan(loss_fn, layers, params, args, kwargs)
        _check_slots(slots, plan.slots())
        return plan.run(params, slots)

    return tapped


def make_slots(
    loss_fn: Callable[..., PyTree], layers: Layers, params: Params, *args: object, **kwargs: object
) -> Captures:
    """Zero slots for `tap`, in the shapes that these arguments lead to.

    Args:
        loss_fn: function of (params, *args, **kwargs).
        layers: from `find_layers`.
        params: argument 0.
        *args: the other arguments.
        **kwargs: keyword arguments.

    Returns:
        For each layer path, one `Capture` per call: `a` in the shape of the layer's input, `u` in
        the shape of its output.

    Raises:
        ValueError: a layer of `layers` is missing, is used differently or has another shape, or
            there is a layer or a parameter that `find_layers` did not see.

    Example: see `tap`.
    """
    check_layers(layers)
    return batch_plan(loss_fn, layers, params, args, kwargs).slots()


def _check_slots(slots: PyTree, expected: Captures) -> None:
    found, structure = flattened(slots, "slots")
    leaves, wanted = flattened(expected, "slots")
    same = structure == wanted and all(
        isinstance(x, jax.Array | np.ndarray) and x.shape == like.shape
        for (_, x), (_, like) in zip(found, leaves, strict=True)
    )
    if not same:
        raise ValueError(
            "slots do not fit: pass what make_slots returns for this function, these layers and "
            "arguments of these shapes"
        )
