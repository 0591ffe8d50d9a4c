"""What a step of kfac-jax costs: ``python -m benchmarks.peers --out out``.

It does not run on the versions of jax that tekfac_jax is made for, and wants an environment of its
own (`benchmarks.kfac_jax_trainer` says which). distributed-kron 2.0 cannot be timed beside SGD at
all: with jax 0.6.2 to 0.10.2 its import fails.

As in `benchmarks.speed` each step is a ratio to one of SGD with momentum that ran in the same
round of the same process, on the same random images, at batch 128.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.errors import UsageError
from benchmarks.kfac_jax_trainer import NOT_INSTALLED, KfacJaxTrainer, is_installed
from benchmarks.loop import Task, Trainer
from benchmarks.options import exit_with
from benchmarks.speed import make_task
from benchmarks.timing import MODELS, in_turn, ratios, settings

_PERIOD = 10  # of the factors and inverses
_BATCH = 128
NAME = f"kfac-jax, {_PERIOD}/{_PERIOD}"


def main(argv: list[str] | None = None) -> None:
    """Times kfac-jax on the models that are asked for, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--models", default="mlp", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--warm-ups", type=int, default=2,
        help="periods of refreshes before the clock, in which memory is new (default: 2)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(argv)
    if not is_installed():
        exit_with(UsageError(NOT_INSTALLED), "peers")
    results = {
        name: measure(make_task(name, _BATCH), options.rounds, options.warm_ups)
        for name in options.models.split(",")
    }
    table = Table("ratio to a step of SGD with momentum", *results)
    table.add_row(NAME, *(f"{found[NAME]['ratio']:.2f}" for found in results.values()))
    Console(width=100).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "peers.json"
    counts = {"rounds": options.rounds, "warm_ups": options.warm_ups}
    record = {"settings": {**counts, **settings()}, "results": results}
    path.write_text(json.dumps(record, indent=2))
    print(f"written: {path}")


def measure(task: Task, rounds: int, warm_ups: int) -> dict[str, Any]:
    """The median ratio, and quartiles, of a step of kfac-jax: the mean over a period."""
    periods = {"curvature_update_period": _PERIOD, "inverse_update_period": _PERIOD}
    steps = {
        "sgd": _stepping(task, Trainer(task, "sgd", {"learning_rate": 0.0}), 1),
        NAME: _stepping(task, KfacJaxTrainer(task, periods), _PERIOD),
    }
    in_turn(steps, warm_ups)
    found = ratios(in_turn(steps, rounds), "sgd")
    del found["sgd"]
    return found


def _stepping(task: Task, trainer: Any, number: int) -> Callable[[], float]:
    """A function that takes so many steps, and returns the mean of their seconds."""
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
