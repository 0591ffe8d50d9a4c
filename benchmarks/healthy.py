"""What a healthy run looks like: ``python -m benchmarks.healthy --out docs/images/healthy.png``.

Trains the small convolutional network on scikit-learn's digits with TEKFAC, records every step,
and draws the record with `tekfac_jax.plot`. Takes less than a minute on a CPU.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import tekfac_jax as tekfac
from benchmarks.data.sets import load_dataset
from benchmarks.errors import UsageError
from benchmarks.models.convnets import make_model
from benchmarks.training.loop import Task
from benchmarks.training.options import exit_with
from tekfac_jax import plot

# The basis is refreshed less often than its factors, so that the picture shows it ageing.
_INTERVALS: dict[str, Any] = {
    "factor_interval": 10,
    "eigenbasis_interval": 50,
    "rescaling_interval": 10,
}
_QUANTITIES = (
    "loss",
    "trace",
    "damping",
    "update_ratio",
    "angle",
    "kl_clip",
    "phi_residual",
    "failures",
)


class Recorded(NamedTuple):
    """A run: scalars of every step, and the curvature at its end."""

    records: list[dict[str, Any]]
    curvature: dict[str, tekfac.Curvature]


def main(argv: list[str] | None = None) -> None:
    """Trains, draws, and prints where the picture is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.healthy", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("out/healthy.png"), metavar="PNG")
    options = parser.parse_args(argv)
    try:
        if min(options.epochs, options.batch_size) < 1:
            raise UsageError("--epochs and --batch-size must be 1 or more")
        if not 0 < options.learning_rate < math.inf:
            raise UsageError(f"--learning-rate is {options.learning_rate}; it must be above 0")
        dataset = load_dataset("digits")
        task = Task(dataset, make_model("cnn", dataset.num_classes), options.batch_size)
    except UsageError as error:
        exit_with(error, "healthy")
    run = record(task, epochs=options.epochs, learning_rate=options.learning_rate)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure = plot.health(run.records, run.curvature, quantities=_QUANTITIES)
    figure.savefig(options.out, dpi=90, pil_kwargs={"optimize": True})
    losses = [record["loss"] for record in run.records]
    print(f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}: {options.out}")


def record(task: Task, *, epochs: int, learning_rate: float, seed: int = 0) -> Recorded:
    """Trains with TEKFAC and keeps what a logger would record, for every step.

    Args:
        task: network and data.
        epochs: length of the run.
        learning_rate: of the first step; it falls to zero along half a cosine.
        seed: of the parameters and of the order of the data.
    """
    params, batch_stats = task.initial_variables(seed)
    layers = tekfac.find_layers(
        task.loss, params, batch_stats, *next(task.batches(seed=seed, epoch=0))
    )
    schedule = optax.cosine_decay_schedule(learning_rate, epochs * task.steps_per_epoch)
    tx = tekfac.tekfac(schedule, layers, **_INTERVALS)
    value_grad_and_stats = tekfac.value_grad_and_stats(task.loss, layers, has_aux=True)

    @jax.jit
    def step(params: Any, batch_stats: Any, opt_state: Any, inputs: Any, labels: Any) -> Any:
        (loss, batch_stats), grads, stats = value_grad_and_stats(
            params, batch_stats, inputs, labels
        )
        updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
        scalars = tekfac.diagnostics(opt_state)
        scalars |= tekfac.step_diagnostics(layers, params, grads, updates)
        params = optax.apply_updates(params, updates)
        return params, batch_stats, opt_state, {**scalars, "loss": loss}

    opt_state, records = tx.init(params), []
    for epoch in range(1, epochs + 1):
        for inputs, labels in task.batches(seed, epoch):
            params, batch_stats, opt_state, scalars = step(
                params, batch_stats, opt_state, inputs, labels
            )
            records.append(jax.tree.map(np.asarray, jax.device_get(scalars)))
    return Recorded(records, tekfac.curvature(opt_state))


if __name__ == "__main__":
    main()
