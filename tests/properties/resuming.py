"""A run that can be killed and resumed; as a program, its arguments are FOLDER [kill]."""

import os
import signal
import sys
import threading
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import tekfac_jax as tekfac

INTERVALS = {"factor_interval": 2, "eigenbasis_interval": 4, "rescaling_interval": 3}
STEPS = 12  # all steps from one at which all three refreshes are due to the next
KILLED_AFTER = 5  # saves


class Net(nn.Module):
    """A convolution and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (2, 2), name="conv")(x))
        return nn.Dense(2, name="head")(x.reshape(len(x), -1))


class Run:
    """A network, an optimizer and one compiled, donating step."""

    def __init__(self, optimizer=tekfac.tekfac, **options):
        self.model, self.x = Net(), self.batch(0)
        self.params = self.model.init(jax.random.key(0), self.x)["params"]
        self.layers = tekfac.find_layers(self.loss, self.params, self.x)
        self.tx = optimizer(0.05, self.layers, **(INTERVALS | options))
        self.step, self.traces = jax.jit(self._step, donate_argnums=(0, 1)), 0

    def loss(self, params, x):
        return jnp.mean(jnp.sum((self.model.apply({"params": params}, x) - 1) ** 2, axis=-1))

    @staticmethod
    def batch(k):
        return jnp.asarray(np.random.default_rng(k).normal(size=(6, 3, 3, 2)), jnp.float32)

    def _step(self, params, opt_state, x):
        self.traces += 1
        _, grads, stats = tekfac.value_grad_and_stats(self.loss, self.layers)(params, x)
        updates, opt_state = self.tx.update(grads, opt_state, params, stats=stats)
        return optax.apply_updates(params, updates), opt_state

    def start(self):
        """Fresh arrays, since a step donates them."""
        params = jax.tree.map(jnp.copy, self.params)
        return params, self.tx.init(params)

    def go_on(self, params, opt_state, first, last=STEPS):
        """Runs the steps from `first` on; yields parameters and state after each."""
        for k in range(first, last):
            params, opt_state = self.step(params, opt_state, self.batch(k))
            yield params, opt_state


def kill_in_the_middle_of_a_save(folder):
    """Sends SIGKILL once a checkpoint is being written under its temporary name."""
    while not any("tmp" in path.name for path in folder.iterdir()):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder, *, kill):
    """Trains to the end, from the last checkpoint if there is one, with a save after each step."""
    run = Run(stagger=True)
    state, first = run.start(), 0
    with ocp.CheckpointManager(folder) as manager:
        last = manager.latest_step()
        if last is not None:
            first, state = last + 1, manager.restore(last, args=ocp.args.StandardRestore(state))
        for k, after in enumerate(run.go_on(*state, first), first):
            manager.wait_until_finished()
            if kill and k == KILLED_AFTER:
                threading.Thread(target=kill_in_the_middle_of_a_save, args=(folder,)).start()
            manager.save(k, args=ocp.args.StandardSave(after))
            state = after
        return state


if __name__ == "__main__":
    train(Path(sys.argv[1]), kill="kill" in sys.argv)
