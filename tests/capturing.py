"""Shared by tests of the capture: small networks, and per-example gradients by brute force."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature.normal_form import normal_form
from tekfac_jax._layers.matrices import to_matrices

EXACT = 1e-10  # relative, float64
SINGLE = 1e-4  # relative, float32
ULPS = 4  # units in the last place of the largest entry
HALF = 3e-2  # relative, bfloat16: 8 bits of mantissa, summed over a handful of terms

x64 = pytest.mark.usefixtures("x64")


x64_standard = pytest.mark.usefixtures("x64_standard")


class Net(nn.Module):
    """A network, given as a function that builds it."""

    build: Callable[..., Any]

    @nn.compact
    def __call__(self, x, **options):
        return self.build(x, **options)


def randn(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers in the default float dtype."""
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.result_type(float))


def random_params(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Random parameters, biases included, in the default float dtype."""
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([0.6 * randn(*s.shape, seed=i) for i, s in enumerate(leaves)])


def losses_of(outputs: jax.Array) -> jax.Array:
    """The loss of each example, neither linear nor quadratic in the outputs."""
    terms = outputs**2 / 2 + jnp.sin(outputs)
    return terms.sum(axis=tuple(range(1, terms.ndim)))


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def captured_gradients(layers, stats) -> dict[str, jax.Array]:
    """G_n of each layer, [N, *lead, in[+1], out]."""
    gradients = {}
    for path, spec in layers.items():
        total: Any = 0.0
        for capture in stats.layers[path]:
            a, u = normal_form(spec, capture, stats.scale.dtype)
            if spec.kind == "embed" and not spec.attended:
                a = jax.nn.one_hot(a[..., 0].astype(int), spec.in_dim, dtype=u.dtype)
            if spec.kind == "norm":
                pair = [(a * u).sum(axis=-2), u.sum(axis=-2)][: spec.in_dim]
                g = jnp.moveaxis(jnp.stack(pair, axis=-1)[..., None], len(spec.stack), 0)
            else:
                g = jnp.einsum("...nti,...nto->n...io", a, u)
            total += g * stats.scale
        gradients[path] = total
    return gradients


def assert_sums_to_gradient(layers, stats, grads, tolerance=EXACT, divisor=None):
    """Asserts that Σ_n G_n is the gradient of the summed loss."""
    divisor = stats.scale if divisor is None else divisor
    expected = to_matrices(grads, layers)
    for path, g in captured_gradients(layers, stats).items():
        error = relative_error(g.sum(axis=0), expected[path] * divisor)
        assert error <= tolerance, f"{path}: {error}"


def assert_exact(losses, params, x, tolerance=EXACT, **options):
    """Asserts that captures are the per-example gradients of `losses`; returns the layers."""

    def loss(params, x):
        return losses(params, x).mean()

    def one_gradient(params, x):
        grads = jax.grad(lambda params: losses(params, x[None])[0])(params)
        return to_matrices(grads, layers)

    layers = tekfac.find_layers(loss, params, x, **options)

    @jax.jit  # one program for all, since compilation takes most of the time
    def everything(params, x):
        _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        captured = captured_gradients(layers, stats)
        expected = jax.vmap(one_gradient, in_axes=(None, 0))(params, x)
        return captured, expected, to_matrices(grads, layers)

    captured, expected, grads = everything(params, x)
    for path, g in captured.items():
        assert relative_error(g, expected[path]) <= tolerance, path
        assert relative_error(g.mean(axis=0), grads[path]) <= tolerance, path
    return layers


def assert_model_is_exact(model, x, **options):
    """`assert_exact` for a model, all of whose kernels must be covered."""
    params = random_params(model, x, **options)

    def losses(params, x):
        return losses_of(model.apply({"params": params}, x, **options))

    layers = assert_exact(losses, params, x)
    assert not layers.uncovered
    return layers


def mlp(x, **options):
    x = jnp.tanh(nn.Dense(4, **options)(x))
    return nn.Dense(3, **options)(x)


def mlp_case():
    """A float32 loss of (params, x), its parameters, and a batch of six."""
    model, x = Net(mlp), randn(6, 4)
    params = random_params(model, x)
    return lambda params, x: losses_of(model.apply({"params": params}, x)).mean(), params, x


def simple_case():
    """`mlp_case`, and its layers."""
    loss, params, x = mlp_case()
    return loss, params, x, tekfac.find_layers(loss, params, x)


def attention_case():
    """A loss with two self-attention blocks, its parameters, and a batch of six."""

    def build(x):
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(3)(x)

    model, x = Net(build), randn(6, 3, 4)
    params = random_params(model, x)
    return lambda params, x: losses_of(model.apply({"params": params}, x)).mean(), params, x
