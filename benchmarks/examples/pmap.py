"""`pmap` with a replicated train state: ``python -m benchmarks.examples.pmap``.

The train state and the batch have a leading axis of devices.
"""

from typing import Any

import jax
from flax import jax_utils

import tekfac_jax as tekfac
from benchmarks.examples import problem

AXIS = "data"


def train(steps: int, devices: int | None = None) -> tuple[Any, float]:
    """Trains on `devices` devices (None: all); returns the train state and the last loss."""
    used = jax.devices()[:devices]
    model = problem.Net(axis_name=AXIS)
    layers, variables = problem.find(model)
    state = problem.first_state(model, layers, variables, axis_name=AXIS)
    state = jax_utils.replicate(state, used)
    grad_fn = tekfac.value_grad_and_stats(problem.make_loss(model), layers, has_aux=True)

    def train_step(state: Any, images: Any, labels: Any) -> Any:
        (loss, batch_stats), grads, stats = grad_fn(state.params, state.batch_stats, images, labels)
        grads, loss = jax.lax.pmean((grads, loss), AXIS)
        return state.apply_gradients(grads=grads, stats=stats, batch_stats=batch_stats), loss

    run = jax.pmap(train_step, AXIS, devices=used)
    loss: Any = None
    for step in range(steps):
        images, labels = problem.batch(step)
        parts = [x.reshape(len(used), -1, *x.shape[1:]) for x in (images, labels)]
        state, loss = run(state, *parts)
    return jax_utils.unreplicate(state), float(loss[0])


if __name__ == "__main__":
    print(f"{len(jax.devices())} devices, loss after 50 steps {train(50)[1]:.3f}")
