"""What a step of TEKFAC costs, as a ratio to one of SGD: ``python -m benchmarks.speed``.

All steps are timed in one process, in turn, on random data: first SGD, then Adam, then each kind
of TEKFAC step, then SGD again, and so on; the figures are medians of the ratios to the SGD step
of the same round. One compiled TEKFAC step serves for all kinds: its three intervals are primes,
and the step count in the state is set to what makes one refresh, all or none of them due.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import tekfac_jax
from benchmarks.data import Dataset
from benchmarks.errors import UsageError, check_choice
from benchmarks.loop import Task, Trainer
from benchmarks.models import CNN, VGG16, ResNet20
from benchmarks.optimizers import Curvature
from benchmarks.options import basis_rank, exit_with
from benchmarks.transformers import ViT

# T_FIM, T_EIG, T_RE of the step that is timed, and the counts at which just one of them divides.
_INTERVALS = Curvature(factor_interval=3, eigenbasis_interval=5, rescaling_interval=7)
_COUNTS = {"off": 1, "factors": 3, "eigenbasis": 5, "rescaling": 7, "all three": 105}
_AMORTISED = {"50/50/200": (50, 50, 200), "10/10/10": (10, 10, 10)}


class MLP(nn.Module):
    """784-512-256-10, without BatchNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, 28, 28, 1) to logits (N, 10)."""
        del train
        x = x.reshape(x.shape[0], -1)
        for width in (512, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


# name -> (model, shape of an image)
MODELS: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {
    "cnn": (CNN(), (8, 8, 1)),
    "mlp": (MLP(), (28, 28, 1)),
    "resnet20": (ResNet20(), (32, 32, 3)),
    "vgg16-half": (VGG16(width=32), (32, 32, 3)),
    "vit": (ViT(), (32, 32, 3)),
}


def main(argv: list[str] | None = None) -> None:
    """Times the models that are asked for, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="cnn,resnet20", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15, help="how often every step is timed")
    parser.add_argument(
        "--basis-rank", type=basis_rank, help="auto, a number or a share: time a small basis"
    )
    parser.add_argument(
        "--spikes", action="store_true", help="time every step of an interval too, staggered or not"
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(argv)
    try:
        names = options.models.split(",")
        for name in names:
            check_choice("model", name, tuple(MODELS))
        if options.batch_size < 1 or options.rounds < 1:
            raise UsageError("--batch-size and --rounds must be 1 or more")
    except UsageError as error:
        exit_with(error, "speed")
    results = {
        name: measure(name, options.batch_size, options.rounds, options.basis_rank)
        for name in names
    }
    if options.spikes:
        for name in names:
            results[name]["spikes"] = measure_spikes(name, options.batch_size)
    _show(results)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "basis_rank": options.basis_rank,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "jax": jax.__version__,
        "tekfac_jax": tekfac_jax.__version__,
    }
    path = options.out / "speed.json"
    path.write_text(json.dumps({"settings": settings, "results": results}, indent=2))
    print(f"\nwritten: {path}")


def measure(name: str, batch_size: int, rounds: int, rank: Any = None) -> dict[str, Any]:
    """All figures of one model.

    Returns:
        ``ratios``: median ratio to SGD for each kind of step; ``spread``: the quartiles of these
        ratios; ``sgd_ms``; and for compile seconds and temporary MiB a figure for each optimizer.
    """
    model, shape = MODELS[name]
    task = Task(_random_data(shape, batch_size), model, batch_size)
    curvature = _INTERVALS._replace(basis_rank=rank)
    trainers = {o: Trainer(task, o, curvature) for o in ("sgd", "adam", "tekfac")}
    batch = next(task.batches(seed=0, epoch=0))
    states = {o: trainer.initial_state(0) for o, trainer in trainers.items()}

    def step(optimizer: str, count: int | None = None) -> float:
        state = states[optimizer]
        if count is not None:
            state = state.replace(opt_state=_at_count(state.opt_state, count))
        jax.block_until_ready(state)
        started = time.perf_counter()
        states[optimizer], loss = trainers[optimizer].compiled(state, *batch, jnp.float32(1e-4))
        jax.block_until_ready((states[optimizer], loss))
        return time.perf_counter() - started

    for _ in range(2):  # the first steps touch new memory, and fill the curvature
        for optimizer, count in (("sgd", None), ("adam", None), ("tekfac", _COUNTS["all three"])):
            step(optimizer, count)
    times: dict[str, list[float]] = {key: [] for key in ("sgd", "adam", *_COUNTS)}
    for _ in range(rounds):
        times["sgd"].append(step("sgd"))
        times["adam"].append(step("adam"))
        for kind, count in _COUNTS.items():
            times[kind].append(step("tekfac", count))
    ratios = {
        kind: [t / sgd for t, sgd in zip(values, times["sgd"], strict=True)]
        for kind, values in times.items()
        if kind != "sgd"
    }
    medians = {kind: statistics.median(values) for kind, values in ratios.items()}
    return {
        "ratios": medians | {k: _amortised(medians, t) for k, t in _AMORTISED.items()},
        "spread": {k: np.quantile(v, [0.25, 0.75]).tolist() for k, v in ratios.items()},
        "sgd_ms": 1e3 * statistics.median(times["sgd"]),
        "compile_seconds": {o: t.compile_seconds for o, t in trainers.items()},
        "temporary_mib": {o: _temporary_mib(t.compiled) for o, t in trainers.items()},
    }


def measure_spikes(name: str, batch_size: int, *, interval: int = 50, rounds: int = 3) -> Any:
    """The worst step of an interval over the median one, with `stagger` and without.

    All three refreshes have the same interval. Each of its steps is timed `rounds` times, in
    turn with the other kind, and counts with the median; the first interval, in which everything is
    new, is left out.
    """
    model, shape = MODELS[name]
    task = Task(_random_data(shape, batch_size), model, batch_size)
    batch = next(task.batches(seed=0, epoch=0))
    kinds = {"together": False, "staggered": True}
    trainers = {
        kind: Trainer(task, "tekfac", Curvature(interval, interval, interval, stagger=stagger))
        for kind, stagger in kinds.items()
    }
    states = {kind: trainer.initial_state(0) for kind, trainer in trainers.items()}
    times: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for _ in range(1 + rounds):
        for kind in kinds:
            times[kind].append([])
        for _ in range(interval):
            for kind, trainer in trainers.items():
                started = time.perf_counter()
                states[kind], loss = trainer.compiled(states[kind], *batch, jnp.float32(1e-4))
                jax.block_until_ready((states[kind], loss))
                times[kind][-1].append(time.perf_counter() - started)
    spikes = {}
    for kind, by_round in times.items():
        steps = np.median(by_round[1:], axis=0)
        spikes[kind] = float(steps.max() / np.median(steps))
    return spikes


def _amortised(ratios: dict[str, float], intervals: tuple[int, int, int]) -> float:
    """Mean cost of a step: the off-step, and each refresh's surplus over its interval."""
    kinds = ("factors", "eigenbasis", "rescaling")
    off = ratios["off"]
    return off + sum((ratios[k] - off) / t for k, t in zip(kinds, intervals, strict=True))


def _at_count(opt_state: Any, count: int) -> Any:
    """The optimizer state with another step count in the curvature's part."""

    def is_ours(node: Any) -> bool:
        return isinstance(node, tekfac_jax.ScaleByTekfacState)

    def change(node: Any) -> Any:
        return node._replace(count=jnp.int32(count)) if is_ours(node) else node

    return jax.tree.map(change, opt_state, is_leaf=is_ours)


def _temporary_mib(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def _random_data(shape: tuple[int, int, int], batch_size: int) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, *shape)).astype(np.float32)
    labels = rng.integers(10, size=batch_size).astype(np.int32)
    return Dataset("random", images, labels, images[:1], labels[:1], 10)


def _show(results: dict[str, dict[str, Any]]) -> None:
    """Prints a column for each model."""
    table = Table("ratio to a step of SGD with momentum", *results)
    for kind in next(iter(results.values()))["ratios"]:
        table.add_row(kind, *(f"{r['ratios'][kind]:.2f}" for r in results.values()))
    for what, unit in (("compile_seconds", "compile, s"), ("temporary_mib", "temporary, MiB")):
        cells = (", ".join(f"{o} {v:.1f}" for o, v in r[what].items()) for r in results.values())
        table.add_row(unit, *cells)
    if all("spikes" in r for r in results.values()):
        for kind in ("together", "staggered"):
            cells = (f"{r['spikes'][kind]:.2f}" for r in results.values())
            table.add_row(f"worst step over median, {kind}", *cells)
    table.add_row("SGD step, ms", *(f"{r['sgd_ms']:.1f}" for r in results.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
