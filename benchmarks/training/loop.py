"""Training: one compiled step for each optimizer, timed without its compilation."""

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tekfac_jax
from benchmarks.data.prefetch import prefetch
from benchmarks.data.sets import Dataset
from benchmarks.errors import UsageError
from benchmarks.optimizers.recipes import (
    RECIPES,
    Curvature,
    divide,
    make_optimizer,
    set_hyperparams,
)

_EVALUATION_BATCH = 500

Augment = Callable[[jax.Array, jax.Array], jax.Array]  # (key, inputs) -> inputs


class TrainState(tekfac_jax.TrainState):
    """The library's train state, the running averages of BatchNorm, and the seed of the run."""

    batch_stats: Any  # empty where the network has no BatchNorm
    seed: jax.Array  # of everything random in a step: augmentation, sampled labels


class Epoch(NamedTuple):
    """What is recorded after an epoch."""

    epoch: int
    train_loss: float  # mean of the steps' losses
    test_accuracy: float | None  # None in the search, which never sees the test set
    seconds: float  # since the start of the run, without evaluation


@dataclasses.dataclass
class Run:
    """One training run."""

    optimizer: str
    learning_rate: float
    seed: int
    epochs: list[Epoch]
    train_loss: float  # of the trained network on the training set, in evaluation mode
    step_seconds: list[float]

    @property
    def diverged(self) -> bool:
        """Whether the loss became infinite or NaN."""
        return not math.isfinite(self.train_loss)

    @property
    def median_step_ms(self) -> float:
        """Time of an ordinary step; most steps do not refresh the curvature."""
        return 1e3 * statistics.median(self.step_seconds)

    @property
    def mean_step_ms(self) -> float:
        """Mean time of a step, refreshes included."""
        return 1e3 * statistics.fmean(self.step_seconds)

    def epochs_to(self, accuracy: float) -> int | None:
        """The first epoch after which the test accuracy was at least `accuracy`; None: never."""
        reached = [e.epoch for e in self.epochs if (e.test_accuracy or 0) >= accuracy]
        return reached[0] if reached else None


class Task:
    """A network and its data: what all optimizers have in common.

    `augment` is applied to the inputs inside the compiled step; None: no augmentation.
    """

    def __init__(
        self, dataset: Dataset, model: nn.Module, batch_size: int, augment: Augment | None = None
    ):
        if batch_size > len(dataset.train_labels):
            raise UsageError(
                f"a batch of {batch_size} is more than the {len(dataset.train_labels)} training "
                f"{dataset.examples}: choose a smaller --batch-size or a larger --subset"
            )
        self.dataset, self.model, self.batch_size = dataset, model, batch_size
        self.augment = augment
        self.steps_per_epoch = len(dataset.train_labels) // batch_size
        self._init = jax.jit(functools.partial(model.init, train=False))
        self._evaluate_batch = jax.jit(self._sums)
        shapes, _ = jax.eval_shape(self.initial_variables, 0)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def initial_variables(self, seed: int) -> tuple[Any, Any]:
        """Parameters and BatchNorm averages; a new copy each time, since steps donate theirs."""
        variables = self._init(jax.random.key(seed), self.dataset.train_inputs[:1])
        return variables["params"], variables.get("batch_stats", {})

    def loss(self, params: Any, batch_stats: Any, inputs: Any, labels: Any) -> tuple[Any, Any]:
        """Mean cross-entropy in training mode, and the new BatchNorm averages.

        Every label counts the same: the loss of a window is the mean over its characters.
        """
        logits, batch_stats = self.logits(params, batch_stats, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), batch_stats

    def logits(self, params: Any, batch_stats: Any, inputs: Any) -> tuple[Any, Any]:
        """Logits in training mode, and the new BatchNorm averages."""
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            inputs, train=True, mutable=["batch_stats"],
        )  # fmt: skip
        return logits, updated.get("batch_stats", {})

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batches of an epoch, the same for every optimizer.

        Each epoch has a new permutation. A last, incomplete batch is left out: another shape would
        need another compilation, and the next epoch leaves out other examples.
        """
        data = self.dataset
        order = np.random.default_rng([seed, epoch]).permutation(len(data.train_labels))
        for step in range(self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield data.train_inputs[chosen], data.train_labels[chosen]

    def evaluate(self, state: TrainState, split: str) -> tuple[float, float]:
        """Mean loss and accuracy in evaluation mode; `split` is "train" or "test"."""
        inputs = getattr(self.dataset, f"{split}_inputs")
        labels = getattr(self.dataset, f"{split}_labels")
        sums = np.zeros(2)
        for start in range(0, len(inputs), _EVALUATION_BATCH):
            chunk = slice(start, start + _EVALUATION_BATCH)
            padded = _pad(inputs[chunk], 0), _pad(labels[chunk], -1)
            sums += jax.device_get(self._evaluate_batch(state.params, state.batch_stats, *padded))
        loss, accuracy = sums / labels.size
        return float(loss), float(accuracy)

    def _sums(self, params: Any, batch_stats: Any, inputs: Any, labels: Any) -> jax.Array:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = self.model.apply(variables, inputs, train=False)
        counted = labels >= 0
        # Padding has the label -1; it picks logit 0, and its loss is masked out.
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        correct = logits.argmax(axis=-1) == labels
        return jnp.stack([jnp.sum(losses, where=counted), jnp.sum(correct).astype(losses.dtype)])


def _pad(array: np.ndarray, value: int) -> np.ndarray:
    """Fills an evaluation batch, so that the last one needs no compilation of its own."""
    missing = _EVALUATION_BATCH - len(array)
    padding = ((0, missing),) + ((0, 0),) * (array.ndim - 1)
    return np.pad(array, padding, constant_values=value)


class Schedule(NamedTuple):
    """How the learning rate falls: to zero along half a cosine, or in steps."""

    decay_every: int | None = None  # epochs; None: cosine
    factor: float = 0.1

    def rate(self, learning_rate: float, epochs_done: float, epochs: int) -> float:
        """The learning rate after `epochs_done` of all `epochs`."""
        if self.decay_every is None:
            return cosine(learning_rate, epochs_done / epochs)
        return learning_rate * self.factor ** math.floor(epochs_done / self.decay_every)


COSINE = Schedule()


class Steps(NamedTuple):
    """The steps of an epoch."""

    losses: list[float]
    seconds: list[float]


def train_epoch(
    task: Task, compiled: Callable[..., Any], state: Any, *, learning_rate: float, seed: int,
    epoch: int, epochs: int, schedule: Schedule = COSINE,
) -> tuple[Any, Steps]:  # fmt: skip
    """One epoch of a run, the same whether or not the run was interrupted before it.

    Args:
        task: network and data.
        compiled: the step, (state, inputs, labels, learning_rate) -> (state, loss).
        state: the state after the epoch before; it is donated.
        learning_rate: of the first step of the run.
        seed: of the order of the data.
        epoch: number of this epoch, from 1.
        epochs: length of the run.
        schedule: how the learning rate falls.

    Returns:
        The new state, and the loss and seconds of each step, which include getting its batch. The
        epoch ends early if the loss is not finite.
    """
    steps = Steps([], [])
    ahead: Any = prefetch(task.batches(seed, epoch))
    with contextlib.closing(ahead) as batches:
        for step in range(task.steps_per_epoch):
            started = time.perf_counter()
            done = epoch - 1 + step / task.steps_per_epoch
            rate = schedule.rate(learning_rate, done, epochs)
            state, loss = compiled(state, *next(batches), jnp.float32(rate))
            jax.block_until_ready((state, loss))
            steps.seconds.append(time.perf_counter() - started)
            steps.losses.append(float(loss))
            if not math.isfinite(steps.losses[-1]):
                break
    return state, steps


class Trains(Protocol):
    """What a run needs from an optimizer on a task; see `Trainer`."""

    task: Task
    layers: Any  # of this library's second-order optimizers; None: of others
    compile_seconds: float

    def initial_state(self, seed: int, settings: Mapping[str, float] | None = None) -> Any:
        """The state that a run starts from; it has `params` and `batch_stats`."""
        ...

    def train_epoch(self, state: Any, **options: Any) -> tuple[Any, Steps]:
        """One epoch of a run: see `train_epoch`."""
        ...


class Trainer:
    """An optimizer on a task: its step, compiled once for every learning rate and seed.

    Numbers that may change without another compilation are kept in the state; `initial_state` takes
    other values for them.

    `compiled` is the step: (state, inputs, labels, learning_rate) -> (state, loss); it donates
    `state`. `gflop` is its arithmetic, counting the largest branch of each conditional.

    Args:
        task: network and data.
        optimizer: its name.
        settings: arguments of the optimizer without its learning rate, and ``fisher``:
            ``"empirical"`` (the default) or ``"sampled"`` labels in the curvature. `Curvature` has
            no effect on first-order optimizers.
    """

    def __init__(self, task: Task, optimizer: str, settings: Curvature | Mapping[str, Any]):
        self.task, self.optimizer = task, optimizer
        second_order = RECIPES[optimizer].second_order
        static, traced = settings, {"learning_rate": 0.0}
        if isinstance(settings, Curvature):
            static = settings._asdict() if second_order else {}
        else:
            static, numbers = divide(settings)
            traced |= numbers
        static = dict(static)
        fisher = static.pop("fisher", "empirical")
        batch = next(task.batches(seed=0, epoch=0))
        params, batch_stats = task.initial_variables(seed=0)
        self.layers, self._stats = None, None
        if second_order:
            self.layers = tekfac_jax.find_layers(task.loss, params, batch_stats, *batch)
            if fisher == "sampled":
                self._stats = tekfac_jax.fisher_stats(
                    task.logits, self.layers, likelihood=tekfac_jax.Categorical(), has_aux=True
                )
        self._tx = make_optimizer(optimizer, self.layers, static, traced)

        step, state = jax.jit(self._step, donate_argnums=0), self.initial_state(0)
        started = time.perf_counter()
        lowered = step.lower(state, *batch, jnp.float32(0))
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        # Analysed before compilation: afterwards a GPU's library calls would not count.
        cost: Any = lowered.cost_analysis()
        self.gflop = cost["flops"] / 1e9

    def initial_state(self, seed: int, settings: Mapping[str, float] | None = None) -> TrainState:
        """The state that a run starts from; new arrays each time, since steps donate theirs.

        Args:
            seed: seed of the parameters, and of everything random in a step.
            settings: other values for the settings kept in the state.
        """
        params, batch_stats = self.task.initial_variables(seed)
        state = TrainState.create(
            apply_fn=self.task.model.apply, params=params, tx=self._tx, batch_stats=batch_stats,
            seed=jnp.asarray(seed, jnp.int32),
        )  # fmt: skip
        changed = {name: jnp.float32(value) for name, value in (settings or {}).items()}
        # Flax starts with a Python number, not with the type that a step returns.
        return state.replace(
            step=jnp.zeros((), jnp.int32), opt_state=set_hyperparams(state.opt_state, changed)
        )

    def _step(
        self, state: TrainState, inputs: Any, labels: Any, learning_rate: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        opt_state = set_hyperparams(state.opt_state, {"learning_rate": learning_rate})
        state = state.replace(opt_state=opt_state)
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        if self.task.augment is not None:
            inputs = self.task.augment(key, inputs)
        arguments = (state.params, state.batch_stats, inputs, labels)
        stats = None
        if self.layers is None or self._stats is not None:
            (loss, batch_stats), grads = jax.value_and_grad(self.task.loss, has_aux=True)(
                *arguments
            )
            if self._stats is not None:
                _, stats = self._stats(*arguments[:3], key=jax.random.fold_in(key, 1))
        else:
            (loss, batch_stats), grads, stats = tekfac_jax.value_grad_and_stats(
                self.task.loss, self.layers, has_aux=True
            )(*arguments)
        new: Any = state.apply_gradients(grads=grads, stats=stats, batch_stats=batch_stats)
        return new, loss

    def train_epoch(self, state: TrainState, **options: Any) -> tuple[TrainState, Steps]:
        """One epoch of a run: see `train_epoch`."""
        return train_epoch(self.task, self.compiled, state, **options)

    def train(
        self,
        learning_rate: float,
        *,
        epochs: int,
        seed: int,
        test: bool = True,
        on_epoch: Callable[[], None] = lambda: None,
    ) -> Run:
        """Trains from new parameters; the learning rate falls to zero along half a cosine.

        Args:
            learning_rate: of the first step.
            epochs: length of the run.
            seed: of the parameters and of the order of the data.
            test: whether to measure the test accuracy after each epoch.
            on_epoch: called after each epoch.

        Returns:
            `Run`; if the loss is not finite, it ends there with an infinite loss.
        """
        task, state = self.task, self.initial_state(seed)
        run = Run(self.optimizer, learning_rate, seed, [], math.inf, [])
        for epoch in range(1, epochs + 1):
            state, steps = self.train_epoch(
                state, learning_rate=learning_rate, seed=seed, epoch=epoch, epochs=epochs
            )
            run.step_seconds.extend(steps.seconds)
            on_epoch()
            if not math.isfinite(sum(steps.losses)):
                return run
            accuracy = task.evaluate(state, "test")[1] if test else None
            run.epochs.append(
                Epoch(epoch, statistics.fmean(steps.losses), accuracy, sum(run.step_seconds))
            )
        loss, _ = task.evaluate(state, "train")
        run.train_loss = loss if math.isfinite(loss) else math.inf
        return run


def cosine(learning_rate: float, progress: float) -> float:
    """The learning rate after a fraction `progress` of the run."""
    return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
