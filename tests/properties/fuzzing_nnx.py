"""A random network as an nnx module, with the weights of the linen module."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tekfac_jax as tekfac
import tekfac_jax.nnx
from tests.capturing import losses_of, relative_error
from tests.properties.fuzzing import Block, Network, Problem, Stack


class NnxStack(nnx.Module):
    """The same blocks as `Stack`, under the same names."""

    def __init__(self, network: Network):
        self.blocks, shape = nnx.static(network.blocks), network.shape
        for number, block in enumerate(network.blocks):
            seen, shape = shape, output_shape(network, number + 1)
            if block.kind != "flatten":
                setattr(self, f"layer_{number}", _layer(block, seen))
            if block.norm is not None:
                setattr(self, f"norm_{number}", _norm(block, shape[-1]))

    def __call__(self, x):
        for number, block in enumerate(self.blocks):
            flatten = block.kind == "flatten"
            x = x.reshape(len(x), -1) if flatten else getattr(self, f"layer_{number}")(x)
            x = getattr(self, f"norm_{number}")(x) if block.norm else x
            x = {"tanh": jnp.tanh, "relu": jax.nn.relu, "none": lambda x: x}[block.activation](x)
        return x


def output_shape(network: Network, blocks: int) -> tuple[int, ...]:
    """The output shape of the first `blocks` blocks."""
    dtype = jnp.float32 if network.rows is None else jnp.int32
    x = jax.ShapeDtypeStruct(network.shape, dtype)
    stack = Stack(network.blocks[:blocks])
    return jax.eval_shape(stack.init_with_output, jax.random.key(0), x)[0].shape


def _layer(block: Block, shape: tuple[int, ...]) -> nnx.Module:
    options: dict[str, Any] = dict(block.options, dtype=block.dtype, rngs=nnx.Rngs(0))
    options["param_dtype"] = jnp.dtype(block.param_dtype)
    if block.kind == "embed":
        return nnx.Embed(options.pop("rows"), *block.features, **options)
    if block.kind == "dense":
        return nnx.Linear(shape[-1], *block.features, **options)
    if block.kind in ("conv", "transpose"):
        kind = nnx.Conv if block.kind == "conv" else nnx.ConvTranspose
        return kind(shape[-1], *block.features, **options)
    axes = np.atleast_1d(options["axis"])
    return nnx.LinearGeneral(tuple(shape[a] for a in axes), block.features, **options)


def _norm(block: Block, features: int) -> nnx.Module:
    options: dict[str, Any] = {"param_dtype": jnp.dtype(block.param_dtype), "rngs": nnx.Rngs(0)}
    if block.norm == "batch":
        return nnx.BatchNorm(features, use_running_average=False, **options)
    return nnx.LayerNorm(features, **options)


def bare(network: Network) -> Network:
    """The network without linen's lifted transformations."""
    return network._replace(blocks=tuple(block._replace(lift=None) for block in network.blocks))


def precise(network: Network) -> Network:
    """The network in float64, since gradients before a BatchNorm may be zero up to rounding."""
    blocks = (b._replace(dtype=None, param_dtype="float64") for b in network.blocks)
    return network._replace(blocks=tuple(blocks))


def loss_of(network: Network) -> Any:
    """The loss of `make_problem`, as a function of a module."""
    return lambda model, x: network.scale * losses_of(model(x).astype(jnp.float64)).mean()


def assert_layers_of_linen(network: Network, problem: Problem) -> None:
    """The same layers are captured, and the same reasons given for the others."""
    model, x = NnxStack(network), problem.batches[0]
    layers = tekfac.nnx.find_layers(loss_of(network), model, x, norm=network.norm)
    assert dict(layers) == dict(problem.layers)
    assert dict(layers.uncovered) == dict(problem.layers.uncovered)


def assert_numbers_of_linen(network: Network, problem: Problem) -> None:
    """Value, gradient and statistics are those of linen."""
    x, model = problem.batches[0], NnxStack(network)
    params = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(params, problem.params)
    nnx.update(model, params)
    loss, layers = loss_of(network), problem.layers
    value, grads, stats = tekfac.value_grad_and_stats(problem.loss, layers)(problem.params, x)
    nnx_value, nnx_grads, nnx_stats = tekfac.nnx.value_grad_and_stats(loss, layers)(model, x)
    bound = 1e-9
    assert relative_error(nnx_value, value) <= bound
    nnx_grads = nnx.to_pure_dict(nnx_grads)
    assert_close(nnx_grads, grads, bound)
    for field in ("a", "u"):
        actual, expected = (
            {path: [getattr(c, field) for c in calls] for path, calls in found.layers.items()}
            for found in (nnx_stats, stats)
        )
        assert_close(actual, expected, bound)


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    """Relative to the largest leaf: some are zero up to rounding (BatchNorm of one example)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def norms(tree: Any) -> list[float]:
        return [
            float(np.linalg.norm(np.ravel(np.asarray(x, float)))) for x in jax.tree.leaves(tree)
        ]

    difference = jax.tree.map(
        lambda x, y: np.asarray(x, float) - np.asarray(y, float), actual, expected
    )
    assert max(norms(difference)) <= bound * max(norms(expected))
