"""Networks of dense layers: a plain one, and two that read a set by its mean."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    widths: Sequence[int]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, ..., features) to (N, ..., outputs)."""
        del train  # nothing here behaves differently in training
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class BagOfWords(nn.Module):
    """Classifies a text by the mean of its words' vectors (fastText, Joulin et al. 2017)."""

    num_classes: int
    vocabulary: int
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Words (N, T), integers below `vocabulary`, to logits (N, num_classes)."""
        x = nn.Embed(self.vocabulary, self.width)(x).mean(axis=1)
        return MLP((self.width,), self.num_classes)(x, train=train)


class DeepSets(nn.Module):
    """Classifies a set of points: the same layers for each point, then their mean, then others.

    Zaheer et al. 2017.
    """

    num_classes: int
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Points (N, T, features) to logits (N, num_classes); their order has no effect."""
        x = MLP((self.width, self.width), self.width)(x, train=train).mean(axis=1)
        return MLP((self.width,), self.num_classes)(x, train=train)
