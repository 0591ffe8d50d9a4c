"""What several devices change, and what they do not: ``python -m benchmarks.scaling``.

On CPU the devices are threads of one machine, so nothing is timed here. What is measured: that
ten steps give the numbers of one device (float64), how many bytes a step communicates (from the
compiled program), how evenly the eigendecompositions of two large networks are shared out, and
how much state a device keeps.
"""

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
from tekfac_jax import LayerSpec

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


# --- two large networks ----------------------------------------------------------------------


def dense(path: str, inputs: int, outputs: int, *, bias: bool = True) -> LayerSpec:
    """A dense layer."""
    return LayerSpec(
        path=path, kind="dense", kernel_shape=(inputs, outputs), contracted=1, use_bias=bias,
        dtype="float32", axes=(-1,),
    )  # fmt: skip


def conv(path: str, inputs: int, outputs: int, window: int) -> LayerSpec:
    """A square convolution without bias."""
    return LayerSpec(
        path=path, kind="conv", kernel_shape=(window, window, inputs, outputs), contracted=3,
        use_bias=False, dtype="float32", strides=(1, 1), dilation=(1, 1), padding="SAME",
    )  # fmt: skip


def resnet50() -> tekfac.Layers:
    """The 53 convolutions and the dense layer of ResNet-50 (He et al. 2016, Table 1)."""
    specs, inputs = [conv("stem", 3, 64, 7)], 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            path = f"stage_{stage}/block_{block}"
            specs.append(conv(f"{path}/reduce", inputs, width, 1))
            specs.append(conv(f"{path}/middle", width, width, 3))
            specs.append(conv(f"{path}/expand", width, 4 * width, 1))
            if block == 0:
                specs.append(conv(f"{path}/shortcut", inputs, 4 * width, 1))
            inputs = 4 * width
    return tekfac.Layers((*specs, dense("head", 2048, 1000)))


def vit(width: int, depth: int) -> tekfac.Layers:
    """The dense layers of a vision transformer for 224×224 (Dosovitskiy et al. 2021, Table 1)."""
    specs = [dense("patches", 16 * 16 * 3, width)]
    for block in range(depth):
        path = f"block_{block}"
        specs += [
            dense(f"{path}/{name}", width, width) for name in ("query", "key", "value", "out")
        ]
        specs += [dense(f"{path}/up", width, 4 * width), dense(f"{path}/down", 4 * width, width)]
    return tekfac.Layers((*specs, dense("head", width, 1000)))


NETWORKS = {"ResNet-50": resnet50(), "ViT-B": vit(768, 12), "ViT-L": vit(1024, 24)}


def state_bytes(layers: tekfac.Layers, devices: int, *, shard_state: bool) -> int:
    """Bytes of curvature state that a device keeps."""
    total = 0
    for spec in layers.values():
        squares = 8 * (spec.in_dim**2 + spec.out_dim**2)
        total += 4 * spec.in_dim * spec.out_dim
        total += squares // devices if shard_state else squares
    return total


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


def main() -> None:
    """Prints the three tables."""
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


if __name__ == "__main__":
    main()
