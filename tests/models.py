"""Small models of common kinds, each a function of a batch."""

import flax.linen as nn
import jax.numpy as jnp


def mlp(x):
    for width in (6, 5):
        x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(3)(x)


def cnn(x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(5, (3, 3), strides=2)(x))
    return nn.Dense(3)(x.reshape(len(x), -1))


class ResidualBlock(nn.Module):
    features: int
    strides: int = 1
    train: bool = True

    @nn.compact
    def __call__(self, x):
        def norm():
            return nn.BatchNorm(use_running_average=not self.train)

        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if y.shape != x.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x)
        return nn.relu(x + y)


def resnet(x):
    x = ResidualBlock(4)(nn.Conv(4, (3, 3), use_bias=False)(x))
    return nn.Dense(3)(ResidualBlock(6, strides=2)(x).mean(axis=(1, 2)))


class TransformerBlock(nn.Module):
    """(x, None) -> (x, None), for a scan over layers."""

    mask: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(x[..., 0]) if self.mask else None
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y, mask=mask)
        y = nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


def vit(x):
    """Patches by a strided convolution, position embeddings, two blocks, the mean over patches."""
    x = nn.Conv(4, (2, 2), strides=2, name="patches")(x)
    x = x.reshape(len(x), -1, 4)
    x = x + nn.Embed(x.shape[1], 4, name="positions")(
        jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    )
    for _ in range(2):
        x, _ = TransformerBlock()(x)
    return nn.Dense(3)(nn.LayerNorm()(x).mean(axis=1))


def decoder(ids, *, tied=False):
    """A decoder-only transformer with its blocks under scan and remat."""
    embed = nn.Embed(7, 4, name="tokens")
    x = embed(ids)
    blocks = nn.scan(
        nn.remat(TransformerBlock), variable_axes={"params": 0}, split_rngs={"params": True},
        length=3,
    )  # fmt: skip
    x, _ = blocks(mask=True, name="blocks")(x, None)
    x = nn.LayerNorm()(x)
    return embed.attend(x) if tied else nn.Dense(7, use_bias=False, name="logits")(x)


def tied_decoder(ids):
    return decoder(ids, tied=True)


def lstm(ids):
    x = nn.Embed(7, 4)(ids)
    return nn.Dense(7)(nn.RNN(nn.LSTMCell(5, param_dtype=x.dtype))(x))


def mixer(x):
    x = nn.Conv(4, (2, 2), strides=2)(x)
    x = x.reshape(len(x), -1, 4)
    y = nn.LayerNorm()(x).swapaxes(1, 2)
    y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(5)(y)))
    x = x + y.swapaxes(1, 2)
    y = nn.LayerNorm()(x)
    x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(y)))
    return nn.Dense(3)(x.mean(axis=1))


def unet(x):
    """Strided and transposed convolutions, with skip connections."""
    first = nn.relu(nn.Conv(3, (3, 3))(x))
    second = nn.relu(nn.Conv(4, (3, 3), strides=2)(first))
    third = nn.relu(nn.Conv(5, (3, 3), strides=2)(second))
    x = nn.relu(nn.ConvTranspose(4, (2, 2), strides=(2, 2))(third))
    x = nn.relu(nn.ConvTranspose(3, (3, 3), strides=(2, 2))(jnp.concatenate([x, second], -1)))
    return nn.Conv(2, (1, 1))(jnp.concatenate([x, first], axis=-1))


class Member(nn.Module):
    @nn.compact
    def __call__(self, x):
        return mlp(x)


def ensemble(x):
    members = nn.vmap(
        Member, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
    )
    return members()(x).mean(axis=0)


def mobile(x):
    """Depthwise and pointwise convolutions."""
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, feature_group_count=2, use_bias=False)(x))
    return nn.Dense(3)(nn.relu(nn.Conv(6, (1, 1))(x)).mean(axis=(1, 2)))


IMAGES, SENTENCES = (5, 8, 8, 2), (5, 6)

# name -> (model, input shape, regular expression of what is not covered, and why)
MODELS = {
    "MLP": (mlp, (6, 4), None),
    "CNN": (cnn, IMAGES, None),
    "ResNet with BatchNorm": (resnet, IMAGES, "BatchNorm"),
    "depthwise-separable CNN": (mobile, IMAGES, None),
    "ViT": (vit, IMAGES, "LayerNorm"),
    "MLP-Mixer": (mixer, IMAGES, "LayerNorm"),
    "U-Net": (unet, IMAGES, None),
    "decoder-only transformer, scan and remat": (decoder, SENTENCES, "LayerNorm"),
    "the same with tied embeddings": (tied_decoder, SENTENCES, "LayerNorm"),
    "LSTM language model": (lstm, SENTENCES, None),
    "ensemble by vmap": (ensemble, (6, 4), None),
}
