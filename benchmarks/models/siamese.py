"""A network that reads two views of each image with one encoder."""

import flax.linen as nn
import jax


class Encoder(nn.Module):
    """Two convolutions and a dense layer."""

    width: int = 16
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (N, H, W, C) to features (N, features)."""
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2)(x))
        return nn.relu(nn.Dense(self.features)(x.reshape(x.shape[0], -1)))


class Siamese(nn.Module):
    """The encoder and the projection of SimCLR (Chen et al. 2020), called once for each view."""

    projected: int = 32

    def setup(self) -> None:
        """Both views use these layers."""
        self.encoder = Encoder()
        self.hidden, self.last = nn.Dense(64), nn.Dense(self.projected)

    def __call__(self, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Two views (N, H, W, C) to projections (N, projected)."""
        return self.project(first), self.project(second)

    def project(self, x: jax.Array) -> jax.Array:
        """What the loss sees of a view."""
        return self.last(nn.relu(self.hidden(self.encoder(x))))

    def features(self, x: jax.Array) -> jax.Array:
        """What is kept after training."""
        return self.encoder(x)
