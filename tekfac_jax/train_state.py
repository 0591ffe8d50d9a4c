"""Flax's train state, with statistics."""

from typing import Any, Self

import optax
from flax.training import train_state

from tekfac_jax._layers.statistics import Statistics


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes `stats`.

    Works with any optax transformation: one that knows nothing of statistics is not shown them.

    Example:
        >>> import jax.numpy as jnp, optax, tekfac_jax as tekfac
        >>> state = tekfac.TrainState.create(
        ...     apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5))
        >>> print(state.apply_gradients(grads={"w": jnp.ones(2)}, stats=None).params["w"])
        [0.5 0.5]
    """

    @classmethod
    def create(
        cls, *, apply_fn: Any, params: Any, tx: optax.GradientTransformation, **fields: Any
    ) -> Self:
        """A state at step 0; as Flax's, with types that a strict checker knows.

        Args:
            apply_fn: usually ``model.apply``.
            params: the parameters.
            tx: the optimizer, whose state is made here.
            **fields: values of further fields.
        """
        state: Any = super().create(apply_fn=apply_fn, params=params, tx=tx, **fields)
        return state

    def apply_gradients(
        self, *, grads: Any, stats: Statistics | None = None, **fields: Any
    ) -> Self:
        """One optimizer step.

        Args:
            grads: gradients in the structure of `params`.
            stats: statistics of the same step, or None: precondition with the curvature held.
            **fields: fields to replace at the same time (`batch_stats`, say).

        Returns:
            The next state, `step` one higher.
        """
        tx = self.tx
        takes_more = optax.with_extra_args_support(tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return takes_more.update(updates, state, params, stats=stats)

        informed = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped: Any = train_state.TrainState.apply_gradients(informed, grads=grads, **fields)
        return stepped.replace(tx=tx)
