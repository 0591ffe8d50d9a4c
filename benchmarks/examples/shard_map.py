"""`shard_map`: ``python -m benchmarks.examples.shard_map``.

Each device runs the step on its part of the batch. Gradients are averaged by hand. With
`check_vma`, by which JAX tracks what differs between devices, JAX sums them itself.
"""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tekfac_jax as tekfac
from benchmarks.examples import problem

AXIS = "data"


def train(steps: int, devices: int | None = None, *, check_vma: bool = True) -> tuple[Any, float]:
    """Trains on `devices` devices (None: all); returns the train state and the last loss."""
    used = jax.devices()[:devices]
    mesh = jax.make_mesh((len(used),), (AXIS,), devices=used, axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec(AXIS)

    model = problem.Net(axis_name=AXIS)
    layers, variables = problem.find(model)
    state = problem.first_state(model, layers, variables, axis_name=AXIS)
    grad_fn = tekfac.value_grad_and_stats(problem.make_loss(model), layers, has_aux=True)

    def train_step(state: Any, images: Any, labels: Any) -> Any:
        (loss, batch_stats), grads, stats = grad_fn(state.params, state.batch_stats, images, labels)
        if check_vma:  # JAX has summed them: every device's loss depends on the parameters
            grads = jax.tree.map(lambda g: g / jax.lax.axis_size(AXIS), grads)
        else:
            grads = jax.lax.pmean(grads, AXIS)
        loss = jax.lax.pmean(loss, AXIS)
        return state.apply_gradients(grads=grads, stats=stats, batch_stats=batch_stats), loss

    run = jax.jit(
        jax.shard_map(
            train_step, mesh=mesh, in_specs=(whole, split, split), out_specs=whole,
            check_vma=check_vma,
        )
    )  # fmt: skip
    loss: Any = None
    for step in range(steps):
        images, labels = jax.device_put(problem.batch(step), NamedSharding(mesh, split))
        state, loss = run(state, images, labels)
    return state, float(loss)


if __name__ == "__main__":
    print(f"{len(jax.devices())} devices, loss after 50 steps {train(50)[1]:.3f}")
