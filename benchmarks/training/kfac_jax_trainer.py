"""kfac-jax in the experiments: it is not an optax transformation, so it has its own step.

It needs an environment of its own, with an older jax than tekfac_jax requires::

    pip install "jax==0.8.2" "flax==0.11.2" kfac-jax optax orbax-checkpoint
    pip install rich matplotlib scikit-learn pillow jaxtyping
    python -m benchmarks.paper reading_resnet8_cifar10 --only kfac-jax --data DIR --out DIR

Pass the same ``--out`` as for the other entries: `benchmarks.report` draws all of them.
"""

import importlib
import importlib.util
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.errors import UsageError
from benchmarks.training.loop import Steps, Task, train_epoch

NAME = "kfac-jax"
NOT_INSTALLED = (
    "kfac-jax, which needs an environment of its own "
    "(benchmarks/training/kfac_jax_trainer.py says which)"
)
# Damping and momentum have no default in kfac-jax; the other values are its own defaults.
_NUMBERS = {"damping": 1e-3, "momentum": 0.9}  # may change from run to run
_STATIC = {"norm_constraint": None, "curvature_update_period": 1, "inverse_update_period": 5}


def is_installed() -> bool:
    """Whether kfac-jax can be imported here."""
    return importlib.util.find_spec("kfac_jax") is not None


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises a UsageError for a setting that this trainer does not pass on."""
    known = {"learning_rate", *_NUMBERS, *_STATIC}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(
            f"{NAME} has no setting {unknown[0]!r}: choose from {', '.join(sorted(known))}"
        )


class State(NamedTuple):
    """What a run continues from."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array
    seed: jax.Array
    numbers: dict[str, jax.Array]  # damping and momentum


class KfacJaxTrainer:
    """kfac-jax on a task, with the interface of `benchmarks.training.loop.Trainer`.

    kfac-jax compiles in its first step. That step is taken here, on a copy, so that no run is
    charged for it.

    Args:
        task: network and data.
        settings: damping, momentum, norm_constraint, the two periods, and the learning rate, which
            is passed to each step.

    Raises:
        UsageError: kfac-jax is not installed, or has no such setting.
    """

    def __init__(self, task: Task, settings: Mapping[str, Any]):
        if not is_installed():
            raise UsageError(NOT_INSTALLED)
        check_settings(settings)
        self.task, self.layers = task, None
        static = {name: settings.get(name, default) for name, default in _STATIC.items()}
        self._numbers = {name: settings.get(name, default) for name, default in _NUMBERS.items()}
        kfac_jax = importlib.import_module("kfac_jax")

        def loss(params: Any, batch_stats: Any, batch: Any) -> tuple[jax.Array, Any]:
            inputs, labels = batch
            logits, batch_stats = task.logits(params, batch_stats, inputs)
            kfac_jax.register_softmax_cross_entropy_loss(logits, labels)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), batch_stats

        # The learning rate is passed to each step; a schedule must not be set.
        self._optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss, has_aux=True), l2_reg=0.0, value_func_has_state=True,
            num_burnin_steps=0, batch_size_extractor=lambda batch: len(batch[0]), **static,
        )  # fmt: skip
        started = time.perf_counter()
        batch = next(task.batches(seed=0, epoch=0))
        jax.block_until_ready(self.compiled(self.initial_state(0), *batch, jnp.float32(0)))
        self.compile_seconds = time.perf_counter() - started

    def initial_state(self, seed: int, settings: Mapping[str, float] | None = None) -> State:
        """The state that a run starts from; new arrays each time, since steps donate theirs."""
        params, batch_stats = self.task.initial_variables(seed)
        batch = next(self.task.batches(seed, epoch=1))
        opt_state = self._optimizer.init(
            params, jax.random.key(seed), batch, func_state=batch_stats
        )
        numbers = {
            name: jnp.float32((settings or {}).get(name, default))
            for name, default in self._numbers.items()
        }
        return State(
            params, batch_stats, opt_state, jnp.zeros((), jnp.int32),
            jnp.asarray(seed, jnp.int32), numbers,
        )  # fmt: skip

    def compiled(
        self, state: State, inputs: Any, labels: Any, learning_rate: jax.Array
    ) -> tuple[State, jax.Array]:
        """One step; it donates the large arrays of `state`."""
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        if self.task.augment is not None:
            inputs = self.task.augment(key, inputs)
        params, opt_state, batch_stats, found = self._optimizer.step(
            state.params, state.opt_state, jax.random.fold_in(key, 1), batch=(inputs, labels),
            func_state=state.batch_stats, learning_rate=learning_rate,
            global_step_int=int(state.step), **state.numbers,
        )  # fmt: skip
        new = state._replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, step=state.step + 1
        )
        return new, jnp.asarray(found["loss"])

    def train_epoch(self, state: State, **options: Any) -> tuple[State, Steps]:
        """One epoch of a run: see `benchmarks.training.loop.train_epoch`."""
        return train_epoch(self.task, self.compiled, state, **options)
