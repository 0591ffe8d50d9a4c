"""What a step of kfac-jax and of PSGD Kron costs: ``python -m benchmarks.peers --out out``.

Neither runs on the versions of jax that tekfac_jax needs, so this module does without it and wants
an environment of its own::

    pip install "jax==0.8.2" "flax==0.11.2" kfac-jax rich matplotlib scikit-learn

distributed-kron 2.0 wants an older jax still: with 0.6.2 to 0.10.2 its import fails.

As in `benchmarks.speed` each step is a ratio to one of SGD with momentum that ran in the same
round of the same process, on the same random images, at batch 128.
"""

import argparse
import functools
import importlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.timing import BATCHES, MODELS, in_turn, random_images, ratios, settings

_PERIOD = 10  # of kfac-jax's factors and inverses
_BATCH = 128

Batch = tuple[jax.Array, jax.Array]


class Problem:
    """A network, its loss and batches that take turns."""

    def __init__(self, name: str):
        self.model, shape = MODELS[name]
        images, labels = random_images(shape, BATCHES * _BATCH)
        self.batches = [
            (jnp.asarray(images[k::BATCHES]), jnp.asarray(labels[k::BATCHES]))
            for k in range(BATCHES)
        ]
        self.taken = 0

    def variables(self) -> tuple[Any, Any]:
        """Parameters and BatchNorm averages."""
        found = self.model.init(jax.random.key(0), self.batches[0][0][:1])
        return found["params"], found.get("batch_stats", {})

    def next(self) -> Batch:
        """The next batch."""
        self.taken += 1
        return self.batches[self.taken % BATCHES]

    def loss(
        self, params: Any, state: Any, batch: Batch,
        register: Callable[[Any, Any], Any] = lambda logits, labels: None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Mean cross-entropy, and the new averages."""
        images, labels = batch
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": state}, images, train=True, mutable=["batch_stats"]
        )
        register(logits, labels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated.get("batch_stats", {})


def _timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def _optax_step(problem: Problem, tx: optax.GradientTransformation) -> Callable[[], float]:
    params, averages = problem.variables()
    kept = [params, averages, tx.init(params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, averages: Any, state: Any, batch: Batch) -> Any:
        (_, averages), grads = jax.value_and_grad(problem.loss, has_aux=True)(
            params, averages, batch
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), averages, state

    def run() -> float:
        def once() -> Any:
            kept[:] = step(*kept, problem.next())
            return kept

        return _timed(once)

    return run


def sgd(problem: Problem) -> dict[str, Callable[[], float]]:
    """The measure of all things."""
    return {"sgd": _optax_step(problem, optax.sgd(1e-4, momentum=0.9))}


def kron(problem: Problem) -> dict[str, Callable[[], float]]:
    """PSGD Kron as distributed-kron has it, with its own settings."""
    make = importlib.import_module("distributed_kron").kron
    return {"kron": _optax_step(problem, make(1e-4))}


def kfac(problem: Problem) -> dict[str, Callable[[], float]]:
    """kfac-jax with fixed damping: a step on average over a whole period of its refreshes."""
    kfac_jax = importlib.import_module("kfac_jax")

    loss = functools.partial(problem.loss, register=kfac_jax.register_softmax_cross_entropy_loss)
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss, has_aux=True), l2_reg=0.0, value_func_has_state=True,
        learning_rate_schedule=lambda step: 1e-4, momentum_schedule=lambda step: 0.9,
        initial_damping=1e-3, num_burnin_steps=0, curvature_update_period=_PERIOD,
        inverse_update_period=_PERIOD, batch_size_extractor=lambda batch: len(batch[0]),
    )  # fmt: skip
    params, averages = problem.variables()
    key = jax.random.key(0)
    state = optimizer.init(params, key, problem.next(), func_state=averages)
    kept: list[Any] = [params, state, averages]

    taken = itertools.count()

    def step() -> float:
        def once() -> Any:
            params, state, averages = kept
            params, state, averages, _ = optimizer.step(
                params, state, key, batch=problem.next(), func_state=averages,
                damping=jnp.float32(1e-3), global_step_int=next(taken),
            )  # fmt: skip
            kept[:] = params, state, averages
            return kept

        return sum(_timed(once) for _ in range(_PERIOD)) / _PERIOD

    return {f"kfac-jax, {_PERIOD}/{_PERIOD}": step}


PEERS = {"sgd": sgd, "kfac-jax": kfac, "kron": kron}


def main(argv: list[str] | None = None) -> None:
    """Times the peers that are asked for, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mlp", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--peers", default="kfac-jax", help="of kfac-jax, kron")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--warm-ups", type=int, default=2,
        help="how often each runs before: compilation, memory that is new (default: 2)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(argv)
    results = {}
    for name in options.models.split(","):
        problem = Problem(name)
        steps: dict[str, Callable[[], float]] = {}
        for peer in ("sgd", *options.peers.split(",")):
            steps |= PEERS[peer](problem)
        in_turn(steps, options.warm_ups)
        found = ratios(in_turn(steps, options.rounds), "sgd")
        del found["sgd"]
        results[name] = found
    table = Table("ratio to a step of SGD with momentum", *results)
    for kind in next(iter(results.values())):
        table.add_row(kind, *(f"{found[kind]['ratio']:.2f}" for found in results.values()))
    Console(width=100).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "peers.json"
    counts = {"rounds": options.rounds, "warm_ups": options.warm_ups}
    record = {"settings": {**counts, **settings()}, "results": results}
    path.write_text(json.dumps(record, indent=2))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
