"""What the input pipeline adds to a step: ``python -m benchmarks.pipeline``.

Times three steps in turn, with ResNet20, SGD and batches of 128. The first has its batch on the
device already, without augmentation. The second draws its batch, copies it to the device and
augments it. The third does the same with a batch that was made ahead. Prints medians, and ratios to
the first step of the same round.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.data.augment import crop_and_flip
from benchmarks.data.prefetch import prefetch
from benchmarks.data.sets import Dataset
from benchmarks.models.convnets import make_model
from benchmarks.training.loop import Task, Trainer
from benchmarks.training.timing import in_turn, random_images, ratios, settings

_BASE = "step alone"


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__).parse_args(
        argv
    )
    times = measure(make_model("resnet20", 10), batch_size=128, rounds=40)
    print(settings())
    for name, found in ratios(times, _BASE).items():
        low, high = found["quartiles"]
        print(
            f"{name:18}{1e3 * statistics.median(times[name]):9.2f} ms"
            f"{found['ratio']:8.3f} ({low:.3f} to {high:.3f})"
        )


def measure(model: nn.Module, *, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step of each kind, on random images of 32×32×3."""
    images, labels = random_images((32, 32, 3), 100 * batch_size)
    data = Dataset("random", images, labels, images[:1], labels[:1], 10)
    plain, augmented = (Task(data, model, batch_size, how) for how in (None, crop_and_flip))

    def batches() -> Iterator[Any]:
        return itertools.chain.from_iterable(plain.batches(0, epoch) for epoch in itertools.count())

    lying = jax.device_put(next(batches()))
    alone, whole = (Trainer(task, "sgd", {}) for task in (plain, augmented))
    with closing(prefetch(batches())) as ahead:
        steps = {
            _BASE: _timed_step(alone, itertools.repeat(lying)),
            "with the pipeline": _timed_step(whole, batches()),
            "made ahead": _timed_step(whole, ahead),
        }
        in_turn(steps, 1)  # the first steps allocate
        return in_turn(steps, rounds)


def _timed_step(trainer: Trainer, batches: Iterator[Any]) -> Callable[[], float]:
    state = trainer.initial_state(0)

    def step() -> float:
        nonlocal state
        started = time.perf_counter()
        state, loss = trainer.compiled(state, *next(batches), jnp.float32(0.01))
        jax.block_until_ready((state, loss))
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    main()
