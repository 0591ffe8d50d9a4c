"""`jit` and `NamedSharding`, the recommended way: ``python -m benchmarks.examples.sharded_jit``.

One program for all devices. The batch is split over the mesh's axis; everything else is on every
device. The step is written as for one device, and `mesh=` divides the curvature's work.
"""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tekfac_jax as tekfac
from benchmarks.examples import problem


def train(steps: int, devices: int | None = None) -> tuple[Any, float]:
    """Trains on `devices` devices (None: all); returns the train state and the last loss."""
    used = jax.devices()[:devices]
    mesh = jax.make_mesh((len(used),), ("data",), devices=used, axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    model = problem.Net()
    layers, variables = problem.find(model)
    state = problem.first_state(model, layers, variables, mesh=mesh)
    state = jax.device_put(state, whole)
    grad_fn = tekfac.value_grad_and_stats(problem.make_loss(model), layers, has_aux=True)

    @jax.jit
    def train_step(state: Any, images: Any, labels: Any) -> Any:
        (loss, batch_stats), grads, stats = grad_fn(state.params, state.batch_stats, images, labels)
        return state.apply_gradients(grads=grads, stats=stats, batch_stats=batch_stats), loss

    loss: Any = None
    for step in range(steps):
        images, labels = jax.device_put(problem.batch(step), split)
        state, loss = train_step(state, images, labels)
    return state, float(loss)


if __name__ == "__main__":
    print(f"{len(jax.devices())} devices, loss after 50 steps {train(50)[1]:.3f}")
