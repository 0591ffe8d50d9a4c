"""A recurrent network for text."""

from typing import Any

import flax.linen as nn
import jax


class LSTM(nn.Module):
    """Predicts every character from those before it in its window, with one layer of LSTM cells."""

    num_classes: int
    width: int = 96

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Characters (N, T), integers below `num_classes`, to logits (N, T, num_classes)."""
        del train  # nothing here behaves differently in training
        x = nn.Embed(self.num_classes, self.width // 2)(x)
        hidden: Any = nn.RNN(nn.LSTMCell(self.width))(x)
        return nn.Dense(self.num_classes)(hidden)
