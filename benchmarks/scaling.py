"""What several devices change, and what they do not: ``python -m benchmarks.scaling``.

On CPU the devices are threads of one machine, so nothing is timed here. Measured are the difference
to one device after ten steps (float64), the bytes that a step communicates (from the compiled
program), how evenly the eigendecompositions of large networks are divided, and how much state a
device keeps.
"""

import argparse
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import tekfac_jax as tekfac
from benchmarks.models.shapes import NETWORKS

STEPS = 10
BATCH = 64


# --- the numbers of one device, and what travels ---------------------------------------------


class Net(nn.Module):
    """Small enough that no factor has a null space: 64 examples, at most 28 rows."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (N, 8, 8, 3) to numbers (N, 4)."""
        x = jnp.tanh(nn.Conv(6, (3, 3), strides=2)(x))
        x = jnp.tanh(nn.Dense(16)(x.mean(axis=(1, 2))))
        return nn.Dense(4)(x)


class Problem:
    """Data in float64, and steps of TEKFAC on it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.model = Net()
        self.x = jnp.asarray(rng.normal(size=(BATCH, 8, 8, 3)))
        self.y = jnp.asarray(rng.normal(size=(BATCH, 4)))
        params = self.model.init(jax.random.key(0), self.x)["params"]
        self.params = jax.tree.map(lambda p: p.astype(self.x.dtype), params)
        self.layers = tekfac.find_layers(self.loss, self.params, self.x, self.y)

    def loss(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Half the squared error, its mean over the examples."""
        outputs: Any = self.model.apply({"params": params}, x)
        return ((outputs - y) ** 2).sum(axis=-1).mean() / 2

    def transform(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        """TEKFAC that refreshes something in every step."""
        intervals = {"factor_interval": 1, "rescaling_interval": 1, "eigenbasis_interval": 2}
        scale = tekfac.scale_by_tekfac(self.layers, damping=0.1, **intervals, **options)
        return optax.chain(scale, optax.sgd(0.05))

    def step(self, tx: Any, params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        """New parameters and state."""
        grad_fn = tekfac.value_grad_and_stats(self.loss, self.layers)
        _, grads, stats = grad_fn(params, x, y)
        updates, state = tx.update(grads, state, params, stats=stats)
        return optax.apply_updates(params, updates), state

    def on_one_device(self) -> Any:
        """The parameters after `STEPS` steps."""
        tx = self.transform()
        params, state = self.params, tx.init(self.params)
        step = jax.jit(lambda *args: self.step(tx, *args))
        for _ in range(STEPS):
            params, state = step(params, state, self.x, self.y)
        return params

    def by_jit(self, devices: int, *, shard_state: bool) -> tuple[Any, str]:
        """The same under `jit` with `NamedSharding`; also the compiled program."""
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        tx = self.transform(mesh=mesh, shard_state=shard_state)
        shapes = jax.eval_shape(tx.init, self.params)
        shardings = tekfac.opt_state_sharding(self.layers, mesh, shapes)
        state = jax.device_put(tx.init(self.params), shardings)
        params, x, y = jax.device_put((self.params, self.x, self.y), (whole, split, split))
        step = jax.jit(lambda *args: self.step(tx, *args), out_shardings=(whole, shardings))
        program = step.lower(params, state, x, y).compile()
        for _ in range(STEPS):
            params, state = program(params, state, x, y)
        return params, program.as_text() or ""

    def by_shard_map(self, devices: int) -> tuple[Any, str]:
        """The same under `shard_map`."""
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        whole, split = PartitionSpec(), PartitionSpec("data")
        tx = self.transform(axis_name="data")

        def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
            grad_fn = tekfac.value_grad_and_stats(self.loss, self.layers)
            _, grads, stats = grad_fn(params, x, y)
            grads = jax.lax.pmean(grads, "data")
            updates, state = tx.update(grads, state, params, stats=stats)
            return optax.apply_updates(params, updates), state

        run = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=whole,
                check_vma=False,
            )
        )  # fmt: skip
        params, state = jax.device_put(
            (self.params, tx.init(self.params)), NamedSharding(mesh, whole)
        )
        x, y = jax.device_put((self.x, self.y), NamedSharding(mesh, split))
        program = run.lower(params, state, x, y).compile()
        for _ in range(STEPS):
            params, state = program(params, state, x, y)
        return params, program.as_text() or ""


def difference(actual: Any, expected: Any) -> float:
    """The largest relative difference of any parameter array."""

    def relative(a: Any, b: Any) -> float:
        a, b = np.asarray(a), np.asarray(b)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return max(jax.tree.leaves(jax.tree.map(relative, actual, expected)))


class Traffic(NamedTuple):
    """Bytes of the results of collectives in a compiled program."""

    every_step: int
    where_due: int  # inside conditionals: at the intervals


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|collective-permute)"
                         r"(?:-start)?\(")  # fmt: skip
_ARRAY = re.compile(r"(f64|f32|bf16|f16|s32|u32|pred|s8|u8)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|called_computations)=\{?%?([\w.\-]+)")
_SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


def traffic(program: str) -> Traffic:
    """What a compiled program communicates, from its text."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if not line.startswith(" ") and (found := _COMPUTATION.match(line)):
            lines = bodies.setdefault(found[1], [])
        lines.append(line)
    conditional, called = set(), {name: set() for name in bodies}
    for name, body in bodies.items():
        for line in body:
            if "conditional(" in line:
                branches = re.findall(
                    r"%([\w.\-]+)", line.split("conditional(", 1)[1].split(")", 1)[1]
                )
                conditional |= set(branches) & set(bodies)
            called[name] |= {other for other in _CALLED.findall(line) if other in bodies}
    waiting = list(conditional)
    while waiting:
        for other in called[waiting.pop()] - conditional:
            conditional.add(other)
            waiting.append(other)
    sums = {True: 0, False: 0}
    for name, body in bodies.items():
        sums[name in conditional] += sum(map(_bytes, body))
    return Traffic(sums[False], sums[True])


def _bytes(line: str) -> int:
    found = _COLLECTIVE.search(line)
    if not found:
        return 0
    return sum(
        _SIZES[kind] * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in _ARRAY.findall(found[1])
    )


def state_bytes(layers: tekfac.Layers, devices: int, *, shard_state: bool) -> int:
    """Bytes of curvature state that a device keeps."""
    total = 0
    for spec in layers.values():
        squares = 8 * (spec.in_dim**2 + spec.out_dim**2)
        total += 4 * spec.in_dim * spec.out_dim
        total += squares // devices if shard_state else squares
    return total


# --- on paper --------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Rates from which a step is estimated. These are assumptions: nothing here was measured.

    Attributes:
        forward: flop/s of forward and backward, in half precision.
        contraction: flop/s of rotations and statistics, in three passes of half precision.
        eigh: flop/s of an eigendecomposition, counted as 9 d³ flop.
        link: bytes/s that a device sends and receives, in a group of up to 8.
        network: the same in larger groups.
    """

    forward: float = 120e12
    contraction: float = 40e12
    eigh: float = 1e12
    link: float = 100e9
    network: float = 25e9


class Seconds(NamedTuple):
    """One step, on average over the intervals."""

    forward_backward: float
    gradients: float  # their sum over devices
    rotations: float  # of all layers, on each device: these are not divided
    statistics: float  # factors and Θ of a device's own examples
    decompositions: float  # of the device with the most work
    curvature: float  # communication of factors, Θ and bases

    @property
    def sgd(self) -> float:
        """The part that a step of SGD takes too."""
        return self.forward_backward + self.gradients


def on_paper(
    layers: tekfac.Layers, devices: int, *, examples: int = 64, machine: Machine = Machine(),  # noqa: B008
    factors: int = 50, rescaling: int = 50, eigenbasis: int = 200,
) -> Seconds:  # fmt: skip
    """The estimate for a step with `examples` on each device, at these intervals."""
    forward = rotations = factor = theta = 0.0
    parameters = triangles = bases = 0
    for spec in layers.values():
        t, i, o = spec.positions, spec.in_dim, spec.out_dim
        forward += 2 * t * i * o
        rotations += 4 * i * o * (i + o)
        gram = 2 * t * (i**2 + o**2) if t == 1 else 2 * t * i * o + 2 * i * o * (0.75 * i + o)
        factor += gram
        theta += 2 * t * i * o + 2 * min(t, o) * i**2 + 2 * min(t, i) * o**2
        parameters += i * o
        triangles += (i * (i + 1) + o * (o + 1)) // 2
        bases += i**2 + o**2
    plan = tekfac.device_plan(layers, devices)
    rate = machine.link if devices <= 8 else machine.network

    def summed(numbers: int) -> float:
        return 2 * (devices - 1) / devices * 4 * numbers / rate

    return Seconds(
        forward_backward=3 * forward * examples / machine.forward,
        gradients=summed(parameters),
        rotations=rotations / machine.contraction,
        statistics=(factor / factors + theta / rescaling) * examples / machine.contraction,
        decompositions=9 * max(plan.loads) / machine.eigh / eigenbasis,
        curvature=summed(triangles) / factors + summed(parameters) / rescaling
        + summed(bases) / eigenbasis,
    )  # fmt: skip


# --- report ----------------------------------------------------------------------------------


def _rows_of_equality(devices: int) -> Iterator[tuple[str, ...]]:
    problem = Problem()
    expected = problem.on_one_device()
    ways = {
        "jit, mesh=": lambda n: problem.by_jit(n, shard_state=False),
        "jit, shard_state=True": lambda n: problem.by_jit(n, shard_state=True),
        "shard_map": problem.by_shard_map,
    }
    for name, run in ways.items():
        for n in (1, 2, 4, 8):
            if n > devices:
                continue
            params, program = run(n)
            found = traffic(program)
            yield (
                name, str(n), f"{difference(params, expected):.0e}",
                f"{found.every_step:,}", f"{found.where_due:,}",
            )  # fmt: skip


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    return table


def main(argv: list[str] | None = None) -> None:
    """Prints the tables."""
    argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__).parse_args(
        argv
    )
    jax.config.update("jax_enable_x64", True)
    console = Console(width=100)
    table = _table(
        f"A small CNN in float64, {STEPS} steps, against one device; bytes of collectives",
        "how", "devices", "difference", "every step", "where something is due",
    )  # fmt: skip
    for row in _rows_of_equality(len(jax.devices())):
        table.add_row(*row)
    console.print(table)
    parameters = sum(p.size for p in jax.tree.leaves(Problem().params))
    console.print(f"(the gradient is {8 * parameters:,} bytes)\n")

    table = _table(
        "Eigendecompositions shared out: largest load over the mean",
        "network", "devices", "balance", "best possible", "ratio",
    )  # fmt: skip
    for name, layers in NETWORKS.items():
        for n in (2, 4, 8, 16, 32, 64):
            plan = tekfac.device_plan(layers, n)
            table.add_row(
                name, str(n), f"{plan.balance:.2f}", f"{plan.bound:.2f}",
                f"{plan.balance / plan.bound:.2f}",
            )  # fmt: skip
    console.print(table)

    table = _table(
        "Curvature state of a device, MiB", "network", "on every device", "8", "64", "512"
    )
    for name, layers in NETWORKS.items():
        sizes = [state_bytes(layers, 1, shard_state=False)]
        sizes += [state_bytes(layers, n, shard_state=True) for n in (8, 64, 512)]
        table.add_row(name, *(f"{size / 2**20:,.0f}" for size in sizes))
    console.print(table)

    table = _table(
        "On paper: ms of a step with 64 examples on each device, intervals 50/200/50 (`Machine` "
        "has the assumptions; nothing was measured)",
        "network", "devices", "SGD", "rotations", "statistics", "eigh", "traffic", "ratio",
    )  # fmt: skip
    for name in ("ResNet-50", "ViT-L"):
        for n in (8, 64, 512):
            found = on_paper(NETWORKS[name], n)
            parts = (*found[2:],)
            table.add_row(
                name, str(n), f"{1e3 * found.sgd:.1f}", *(f"{1e3 * part:.1f}" for part in parts),
                f"{sum(found) / found.sgd:.2f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
