"""Trains an optimizer on a workload; its step is compiled once for all rates and seeds."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tekfac_jax
from benchmarks.optimizers.recipes import RECIPES, make_optimizer, set_hyperparams
from benchmarks.problems.workload import Batch, ModelState, Params, Workload
from benchmarks.training.loop import cosine


class State(NamedTuple):
    """What a step changes, and the key of everything random in it."""

    params: Params
    model_state: ModelState
    opt_state: Any
    step: jax.Array
    key: jax.Array


class Trained(NamedTuple):
    """A finished run; it ends early at a loss that is not finite."""

    losses: list[float]
    seconds: list[float]  # of each step
    state: State


class Stepper:
    """An optimizer on a workload.

    Args:
        workload: what is trained.
        optimizer: its name.
        options: further arguments of the optimizer.

    Raises:
        UsageError: an option that the optimizer does not have.
        ValueError: an option with a value that it does not accept.
    """

    def __init__(self, workload: Workload, optimizer: str, options: Mapping[str, Any]):
        self.workload, self.layers = workload, None
        batch, key = next(workload.batches(0)), jax.random.key(0)
        if RECIPES[optimizer].second_order:
            variables = jax.eval_shape(workload.init, key)
            self.layers = tekfac_jax.find_layers(workload.loss_fn, *variables, batch, key)
        self._tx = make_optimizer(optimizer, self.layers, options)
        step, state = jax.jit(self._step, donate_argnums=0), self.initial_state(0)
        started = time.perf_counter()
        self._compiled = step.lower(state, batch, jnp.float32(0)).compile()
        self.compile_seconds = time.perf_counter() - started
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def initial_state(self, seed: int) -> State:
        """The state that a run starts from; new arrays each time, since steps donate theirs."""
        of_params, of_steps = jax.random.split(jax.random.key(seed))
        params, model_state = self.workload.init(of_params)
        opt_state = self._tx.init(params)
        return State(params, model_state, opt_state, jnp.zeros((), jnp.int32), of_steps)

    def train(self, rate: float, seed: int) -> Trained:
        """A whole run; the learning rate falls to zero along half a cosine."""
        state, steps = self.initial_state(seed), self.workload.steps
        run = Trained([], [], state)
        for step, batch in zip(range(steps), self.workload.batches(seed), strict=False):
            now = jnp.float32(cosine(rate, step / steps))
            batch = jax.block_until_ready(jax.device_put(batch))
            started = time.perf_counter()
            state, loss = jax.block_until_ready(self._compiled(state, batch, now))
            run.seconds.append(time.perf_counter() - started)
            run.losses.append(float(loss))
            if not math.isfinite(run.losses[-1]):
                break
        return run._replace(state=state)

    def _step(self, state: State, batch: Batch, rate: jax.Array) -> tuple[State, jax.Array]:
        arguments = (
            state.params, state.model_state, batch, jax.random.fold_in(state.key, state.step)
        )  # fmt: skip
        loss_fn, extra = self.workload.loss_fn, {}
        if self.layers is None:
            (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(*arguments)
        else:
            (loss, model_state), grads, extra["stats"] = tekfac_jax.value_grad_and_stats(
                loss_fn, self.layers, has_aux=True
            )(*arguments)
        opt_state = set_hyperparams(state.opt_state, {"learning_rate": rate})
        updates, opt_state = self._tx.update(grads, opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        new = State(params, model_state, opt_state, state.step + 1, state.key)
        return new, loss
