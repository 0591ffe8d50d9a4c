"""MLP-Mixer: dense layers across positions, then across channels."""

import flax.linen as nn
import jax


class _MixerBlock(nn.Module):
    """Two dense layers over positions, then two over channels, each beside a shortcut."""

    token_width: int
    channel_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, width) to the same shape."""
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(self.token_width)(y)))
        x = x + y.swapaxes(1, 2)
        y = nn.gelu(nn.Dense(self.channel_width)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class Mixer(nn.Module):
    """A small MLP-Mixer (Tolstikhin et al. 2021): mean over positions, head that starts at zero."""

    num_classes: int = 10
    width: int = 64
    depth: int = 3
    patch: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes); H and W multiples of `patch`."""
        del train  # nothing here behaves differently in training
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.depth):
            x = _MixerBlock(self.width // 2, 2 * self.width)(x)
        x = nn.LayerNorm()(x).mean(axis=1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(x)
