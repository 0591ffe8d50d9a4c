"""Several processes, each started with its number.

For two: ``python -m benchmarks.examples.processes --processes 2 --process 0`` and ``--process 1``.

As `sharded_jit`, with a mesh over the devices of all processes; each process provides its part of
the batch. Checkpoints are written together and read by any number of processes. If one process
dies, the others cannot go on: they end with a sentence, and the job must be started again.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tekfac_jax as tekfac
from benchmarks.examples import problem

LOST = 17  # exit code if another process was lost


def train(steps: int, directory: Path, save_every: int) -> tuple[Any, float]:
    """Trains from the last checkpoint in `directory`, or from the beginning."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    model = problem.Net()
    layers, variables = problem.find(model)
    state = problem.first_state(model, layers, variables, mesh=mesh)
    state = jax.jit(lambda state: state, out_shardings=whole)(state)
    grad_fn = tekfac.value_grad_and_stats(problem.make_loss(model), layers, has_aux=True)

    @jax.jit
    def train_step(state: Any, images: Any, labels: Any) -> Any:
        (loss, batch_stats), grads, stats = grad_fn(state.params, state.batch_stats, images, labels)
        return state.apply_gradients(grads=grads, stats=stats, batch_stats=batch_stats), loss

    def own_part(x: np.ndarray) -> jax.Array:
        part = np.array_split(x, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(split, part, x.shape)

    loss = np.nan
    with ocp.CheckpointManager(directory.absolute()) as checkpoints:
        first = checkpoints.latest_step() or 0
        if first:
            state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
        for step in range(first, steps):
            state, loss = train_step(state, *map(own_part, problem.batch(step)))
            loss = float(loss)  # waits for the step, and so for all the others
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)
            if (step + 1) % save_every == 0:
                checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
                checkpoints.wait_until_finished()
    return state, float(loss)


def main(argv: list[str] | None = None) -> None:
    """One process of the job."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.examples.processes", description=__doc__
    )
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--process", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--coordinator", default="localhost:9876", help="address of process 0")
    parser.add_argument("--directory", type=Path, required=True, help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--timeout", type=int, default=60, help="seconds to wait for the others")
    options = parser.parse_args(argv)
    if options.processes > 1:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process,
            initialization_timeout=options.timeout, heartbeat_timeout_seconds=options.timeout,
        )  # fmt: skip
    try:
        state, loss = train(options.steps, options.directory, options.save_every)
    except jax.errors.JaxRuntimeError as error:
        # Every collective would wait for the lost process: exit at once.
        print(
            f"process {options.process}: another process was lost ({str(error).splitlines()[0]}). "
            "Start the job again; it continues from the last checkpoint.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST)
    if options.process == 0:
        np.savez(
            options.directory / "parameters.npz", *map(np.asarray, jax.tree.leaves(state.params))
        )
        print(f"done: loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
