"""What a step of kfac-jax and of PSGD Kron costs: ``python -m benchmarks.peers --out out``.

Neither runs with the versions that tekfac_jax requires, so each needs an environment of its own.
The one for kfac-jax is in `benchmarks.training.kfac_jax_trainer`; the one for PSGD Kron is::

    pip install "jax==0.10.2" "flax==0.12.8" "optax==0.2.6" psgd-jax
    pip install rich matplotlib scikit-learn pillow jaxtyping

Whatever is installed is timed. As in `benchmarks.speed`, the figures are ratios to a step of SGD
with momentum that ran in the same round of the same process, on the same random images, at batch
128. (Kron is that of psgd-jax: distributed-kron, by the same author, cannot be imported with jax
0.6.2 to 0.10.2.)
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.errors import UsageError, check_choice
from benchmarks.optimizers.recipes import RECIPES
from benchmarks.speed import make_task
from benchmarks.training.kfac_jax_trainer import KfacJaxTrainer, is_installed
from benchmarks.training.loop import Task, Trainer
from benchmarks.training.options import exit_with
from benchmarks.training.timing import MODELS, in_turn, ratios, settings

_BATCH = 128
_NOT_INSTALLED = (
    "neither kfac-jax nor psgd-jax is installed; each needs an environment of its own: "
    "benchmarks/training/kfac_jax_trainer.py and benchmarks/peers.py say which"
)


class Peer(NamedTuple):
    """An optimizer that is timed over whole periods of its refreshes."""

    make: Callable[[Task], Any]
    period: int


def peers() -> dict[str, Peer]:
    """The installed peers, by name."""
    found = {}
    if is_installed():
        periods = {"curvature_update_period": 10, "inverse_update_period": 10}
        found["kfac-jax, 10/10"] = Peer(lambda task: KfacJaxTrainer(task, periods), 10)
    if "kron" in RECIPES:  # it refreshes at random steps, hence a long period
        found["PSGD Kron, 0.03"] = Peer(lambda task: Trainer(task, "kron", {}), 100)
    return found


def main(argv: list[str] | None = None) -> None:
    """Times the peers on the given models, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--models", default="mlp", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--warm-ups", type=int, default=2,
        help="untimed periods of refreshes at the start, which touch new memory (default: 2)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(argv)
    installed, models = peers(), options.models.split(",")
    try:
        if not installed:
            raise UsageError(_NOT_INSTALLED)
        for name in models:
            check_choice("model", name, tuple(MODELS))
        if options.rounds < 1 or options.warm_ups < 0:
            raise UsageError("--rounds must be 1 or more, --warm-ups 0 or more")
    except UsageError as error:
        exit_with(error, "peers")
    results = {
        name: measure(make_task(name, _BATCH), installed, options.rounds, options.warm_ups)
        for name in models
    }
    table = Table("ratio to a step of SGD with momentum", *results)
    for peer in installed:
        table.add_row(peer, *(f"{found[peer]['ratio']:.2f}" for found in results.values()))
    Console(width=100).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "peers.json"
    counts = {"rounds": options.rounds, "warm_ups": options.warm_ups}
    record = {"settings": {**counts, **settings()}, "results": results}
    path.write_text(json.dumps(record, indent=2))
    print(f"written: {path}")


def measure(task: Task, timed: dict[str, Peer], rounds: int, warm_ups: int) -> dict[str, Any]:
    """The median ratio, and quartiles, of a step of each peer: the mean over a period."""
    steps = {"sgd": _stepping(task, Trainer(task, "sgd", {"learning_rate": 0.0}), 1)}
    for name, peer in timed.items():
        steps[name] = _stepping(task, peer.make(task), peer.period)
    in_turn(steps, warm_ups)
    found = ratios(in_turn(steps, rounds), "sgd")
    del found["sgd"]
    return found


def _stepping(task: Task, trainer: Any, number: int) -> Callable[[], float]:
    """A function that takes `number` steps and returns the mean of their seconds."""
    batches, taken = list(task.batches(seed=0, epoch=0)), 0
    state = trainer.initial_state(0)

    def run() -> float:
        nonlocal state, taken
        started = time.perf_counter()
        for _ in range(number):
            batch = batches[taken % len(batches)]
            state, loss = trainer.compiled(state, *batch, jnp.float32(1e-4))
            jax.block_until_ready((state, loss))
            taken += 1
        return (time.perf_counter() - started) / number

    return run


if __name__ == "__main__":
    main()
