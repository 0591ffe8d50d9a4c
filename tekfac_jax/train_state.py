"""Flax's train state, whose step also takes curvature statistics."""

from collections.abc import Callable
from typing import Self, cast

import optax
from flax.training import train_state

from tekfac_jax._layers.statistics import StatisticsOfBatch
from tekfac_jax._layers.types import OptState, Params, PyTree


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes `stats`.

    Works with any optax transformation: `stats` reaches only those that accept it.

    Example:
        >>> import jax.numpy as jnp, optax, tekfac_jax as tekfac
        >>> state = tekfac.TrainState.create(
        ...     apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5))
        >>> print(state.apply_gradients(grads={"w": jnp.ones(2)}, stats=None).params["w"])
        [0.5 0.5]
    """

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., PyTree] | None,
        params: Params,
        tx: optax.GradientTransformation,
        **fields: object,
    ) -> Self:
        """A state at step 0: Flax's `create` with complete types.

        Args:
            apply_fn: usually ``model.apply``.
            params: the parameters.
            tx: the optimizer; its state is initialised here.
            **fields: values of further fields.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **fields)
        return cast(Self, state)

    def apply_gradients(
        self, *, grads: Params, stats: StatisticsOfBatch | None = None, **fields: object
    ) -> Self:
        """One optimizer step.

        Args:
            grads: gradients in the structure of `params`.
            stats: statistics of the same step, or None to precondition with the held curvature.
            **fields: fields to replace at the same time (`batch_stats`, say).

        Returns:
            The next state; `step` is one higher.
        """
        # Flax's step calls `tx.update` without statistics, so it runs with a `tx` that adds them.
        tx = self.tx
        takes_more = optax.with_extra_args_support(tx)

        def update(
            updates: Params, state: OptState, params: Params = None
        ) -> tuple[Params, OptState]:
            return takes_more.update(updates, state, params, stats=stats)

        informed = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = train_state.TrainState.apply_gradients(informed, grads=grads, **fields)
        return cast(Self, stepped.replace(tx=tx))
