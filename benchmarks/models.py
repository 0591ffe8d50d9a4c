"""Networks by name: a CNN, ResNet20 and VGG16 here, `benchmarks.transformers` beside it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.data import Examples
from benchmarks.errors import UsageError, check_choice
from benchmarks.transformers import Transformer, ViT

_conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=nn.initializers.he_normal())
# What BatchNorm shifts away again needs no bias before it.
_conv_before_norm = functools.partial(_conv, use_bias=False)


def _norm(train: bool, affine: bool) -> Callable[[jax.Array], jax.Array]:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, use_bias=affine, use_scale=affine
    )


class CNN(nn.Module):
    """Two convolutions and two dense layers: 21,546 parameters for 8×8×1 images and 10 classes."""

    num_classes: int = 10
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes); H and W multiples of 8."""
        del train  # nothing here behaves differently in training
        x = nn.relu(_conv(self.width)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(_conv(2 * self.width)(x))
        # 4×4 positions whatever the image: the curvature of the dense layer stays affordable.
        window = (x.shape[1] // 4, x.shape[2] // 4)
        x = nn.avg_pool(x, window, window)
        x = nn.relu(nn.Dense(2 * self.width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class _BasicBlock(nn.Module):
    """Two convolutions beside an identity shortcut."""

    width: int
    stride: int
    affine: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = _conv_before_norm(self.width, strides=self.stride)(x)
        y = nn.relu(_norm(train, self.affine)(y))
        y = _norm(train, self.affine)(_conv_before_norm(self.width)(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        new_channels = self.width - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new_channels)))
        return nn.relu(y + shortcut)


class ResNet20(nn.Module):
    """ResNet20 for CIFAR (He et al. 2016, section 4.2): three stages of three basic blocks.

    Shortcuts are identities (option A of the paper, used there for CIFAR): where the resolution
    halves, every second position is kept and the new channels are zero. 269,722 parameters at
    width 16 with 10 classes.
    """

    num_classes: int = 10
    width: int = 16
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes)."""
        x = nn.relu(_norm(train, self.affine)(_conv_before_norm(self.width)(x)))
        for stage in range(3):
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _BasicBlock(self.width * 2**stage, stride, self.affine)(x, train=train)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class VGG16(nn.Module):
    """VGG16 (Simonyan and Zisserman 2015, configuration D) for 32×32 images.

    As usual for CIFAR: BatchNorm after each of the 13 convolutions, and one dense layer for three,
    since five poolings leave a single position. On CPU take ``width=32``: XLA is very slow at
    512 → 512 channels on 2×2 positions.
    """

    num_classes: int = 10
    width: int = 64
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, 32, 32, C) to logits (N, num_classes)."""
        if x.shape[1:3] != (32, 32):
            raise UsageError(
                f"vgg16 is made for 32x32 images, these are {x.shape[1]}x{x.shape[2]}: choose cnn "
                "or resnet20"
            )
        for depth, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
            for _ in range(depth):
                x = _conv_before_norm(self.width * factor)(x)
                x = nn.relu(_norm(train, self.affine)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class Kind(NamedTuple):
    """How a model is made from (num_classes, width=...), and what it reads."""

    make: Callable[..., nn.Module]
    examples: Examples
    has_norm: bool  # then it also takes `affine`


MODELS = {
    "cnn": Kind(CNN, "images", False),
    "resnet20": Kind(ResNet20, "images", True),
    "vgg16": Kind(VGG16, "images", True),
    "vit": Kind(ViT, "images", True),
    "transformer": Kind(Transformer, "windows", True),
}


def check_model(name: str, dataset: str, examples: Examples) -> None:
    """Raises a `UsageError` unless `name` is a model for the examples of `dataset`."""
    check_choice("model", name, tuple(MODELS))
    fitting = [model for model, kind in MODELS.items() if kind.examples == examples]
    if name not in fitting:
        raise UsageError(
            f"{name} reads {MODELS[name].examples}, {dataset} has {examples}: choose for --model "
            f"{' or '.join(fitting)}, or another --dataset"
        )


def make_model(
    name: str, num_classes: int, width: int | None = None, *, affine: bool = True
) -> nn.Module:
    """A model by its name.

    Args:
        name: one of `MODELS`.
        num_classes: number of logits.
        width: channels of the first convolution, of transformers the features of a position;
            None: the model's usual width.
        affine: whether BatchNorm and LayerNorm have a scale and a bias of their own; `cnn` has
            neither norm.

    Returns:
        Module of (inputs, train=...).

    Raises:
        UsageError: unknown name.
    """
    check_choice("model", name, tuple(MODELS))
    kind = MODELS[name]
    options: dict[str, Any] = {} if width is None else {"width": width}
    if kind.has_norm:
        options["affine"] = affine
    return kind.make(num_classes, **options)
