"""What statistics cost in memory: ``python -m benchmarks.memory``.

Prints the temporary memory of a compiled gradient by XLA's own analysis: plain, with raw
statistics, and with reduced ones. Then prints the optimizer state for the kernels and biases of
known networks, from their shapes. Nothing is run.
"""

import argparse
import functools
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import tekfac_jax as tekfac
from benchmarks.errors import UsageError
from benchmarks.models.convnets import VGG16, ResNet20
from benchmarks.models.shapes import NETWORKS
from benchmarks.training.options import exit_with


class Block(nn.Module):
    """A residual block of two Dense layers, for a scan over layers."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """(N, T, F) to the same shape, and None."""
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class Stack(nn.Module):
    """Blocks under `nn.scan`, with `nn.remat` around each or not."""

    depth: int
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, F) to the same shape."""
        blocks = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        return blocks()(x, None)[0]


def main(argv: list[str] | None = None) -> None:
    """Compiles the gradients, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(argv)
    sizes = options.depth, options.width, options.positions, options.batch_size
    if min(sizes) < 1:
        exit_with(
            UsageError("--depth, --width, --positions, --batch-size must be 1 or more"), "memory"
        )
    shape = options.batch_size, options.positions, options.width
    results = {
        name: measure(Stack(options.depth, remat), shape)
        for name, remat in (("scan", False), ("scan and remat", True))
    }
    table = Table("temporary MiB", *results)
    for kind in next(iter(results.values())):
        table.add_row(kind, *(f"{result[kind]:.1f}" for result in results.values()))
    Console(width=100).print(table)
    states = {name: states_of(layers) for name, layers in known_networks().items()}
    table = Table("MiB of state", *states)
    for kind in next(iter(states.values())):
        table.add_row(kind, *(f"{state[kind]:,.1f}" for state in states.values()))
    Console(width=100).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "depth": options.depth, "width": options.width, "positions": options.positions,
        "batch_size": options.batch_size, "backend": jax.default_backend(),
        "platform": platform.platform(), "jax": jax.__version__,
        "tekfac_jax": tekfac.__version__,
    }  # fmt: skip
    path = options.out / "memory.json"
    path.write_text(
        json.dumps({"settings": settings, "results": results, "states": states}, indent=2)
    )
    print(f"\nwritten: {path}")


def known_networks() -> dict[str, tekfac.Layers]:
    """Layers by the name of their network."""
    found = {}
    for name, model in (("ResNet20", ResNet20()), ("VGG16", VGG16())):
        x = jnp.zeros((2, 32, 32, 3))
        variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)

        def loss_fn(params: Any, rest: Any, x: jax.Array, model: nn.Module = model) -> jax.Array:
            outputs: Any = model.apply({"params": params, **rest}, x, train=False)
            return jnp.mean(outputs**2)

        rest = {key: value for key, value in variables.items() if key != "params"}
        found[name] = tekfac.find_layers(loss_fn, variables["params"], rest, x)
    return found | {name: NETWORKS[name] for name in ("ResNet-50", "ViT-B")}


def states_of(layers: tekfac.Layers) -> dict[str, float]:
    """Optimizer state for these layers in MiB of float32, momentum included, by optimizer.

    K-FAC: two factors and their inverses, and momentum. SOAP: two factors and their eigenvectors,
    and Adam's two averages (Vyas et al. 2024, without limits on the sides).
    """
    parameters = sum(math.prod(s.lead) * s.in_dim * s.out_dim for s in layers.values())
    squares = sum(math.prod(s.lead) * (s.in_dim**2 + s.out_dim**2) for s in layers.values())

    def ours(rank: Any) -> float:
        state = jax.eval_shape(tekfac.scale_by_tekfac(layers, basis_rank=rank).init, None)
        curvature = sum(sum(kinds.values()) for kinds in tekfac.memory_usage(state).values())
        return (curvature + 4 * parameters) / 2**20

    return {
        "SGD with momentum": 4 * parameters / 2**20,
        "Adam": 8 * parameters / 2**20,
        "K-FAC": 4 * (2 * squares + parameters) / 2**20,
        "SOAP": 4 * (2 * squares + 2 * parameters) / 2**20,
        "TEKFAC": ours(None),
        'TEKFAC, basis_rank="auto"': ours("auto"),
    }


def measure(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, float]:
    """MiB of temporary memory and of statistics, by kind of gradient."""
    x = jnp.zeros(shape)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"]

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        outputs: Any = model.apply({"params": params}, x)
        return jnp.mean(outputs**2)

    layers = tekfac.find_layers(loss_fn, params, x)
    state = jax.eval_shape(tekfac.scale_by_tekfac(layers).init, params)
    reduced = tekfac.value_grad_and_stats(loss_fn, layers, mode="reduced")
    found = {
        "plain gradient": mebibytes(jax.value_and_grad(loss_fn), params, x),
        "with raw statistics": mebibytes(tekfac.value_grad_and_stats(loss_fn, layers), params, x),
        "with reduced statistics": mebibytes(reduced, params, x, opt_state=state),
    }
    usage = tekfac.memory_usage(state).values()
    found["of these, the statistics"] = sum(u["factors"] + u["rescaling"] for u in usage) / 2**20
    return found


def mebibytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """MiB of a compiled function's temporary memory, and of what it returns beside the gradient."""
    analysis = jax.jit(function).lower(*args, **kwargs).compile().memory_analysis()
    gradient = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[0]))
    assert analysis is not None
    return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes - gradient) / 2**20


if __name__ == "__main__":
    main()
