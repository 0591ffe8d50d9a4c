"""Networks by name: a CNN, ResNets and VGGs; `transformers` holds the others."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from benchmarks.data.sets import Examples
from benchmarks.errors import UsageError, check_choice
from benchmarks.models.transformers import Transformer, ViT, head

# Types to compute in; parameters are float32 in any case.
DTYPES = ("float32", "bfloat16")

_conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=nn.initializers.he_normal())
# No bias: the BatchNorm that follows would subtract it again.
_conv_before_norm = functools.partial(_conv, use_bias=False)


def _norm(train: bool, affine: bool, dtype: Dtype | None) -> Callable[[jax.Array], jax.Array]:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, use_bias=affine, use_scale=affine, dtype=dtype
    )


class CNN(nn.Module):
    """Two convolutions and two dense layers: 21,546 parameters for 8×8×1 images and 10 classes."""

    num_classes: int = 10
    width: int = 16
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes); H and W multiples of 8."""
        del train  # nothing here behaves differently in training
        x = nn.relu(_conv(self.width, dtype=self.dtype)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(_conv(2 * self.width, dtype=self.dtype)(x))
        # Always 4×4 positions, so that the dense layer's curvature stays affordable.
        window = (x.shape[1] // 4, x.shape[2] // 4)
        x = nn.avg_pool(x, window, window)
        x = nn.relu(nn.Dense(2 * self.width, dtype=self.dtype)(x.reshape(x.shape[0], -1)))
        return head(self.num_classes, self.dtype)(x)


class _BasicBlock(nn.Module):
    """Two convolutions beside an identity shortcut."""

    width: int
    stride: int
    affine: bool
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(_norm, train, self.affine, self.dtype)
        y = _conv_before_norm(self.width, strides=self.stride, dtype=self.dtype)(x)
        y = nn.relu(norm()(y))
        y = norm()(_conv_before_norm(self.width, dtype=self.dtype)(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        new_channels = self.width - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new_channels)))
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """ResNet for CIFAR (He et al. 2016, section 4.2): three stages of basic blocks.

    `depth` counts the layers with a kernel: 6n + 2 for n blocks per stage. Shortcuts are identities
    (option A, which the paper uses for CIFAR): where the resolution halves, every second position
    is kept and the new channels are zero. ResNet20 has 269,722 parameters at width 16 with 10
    classes.
    """

    num_classes: int = 10
    width: int = 16
    affine: bool = True
    depth: int = 20
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes)."""
        blocks, rest = divmod(self.depth - 2, 6)
        if blocks < 1 or rest:
            raise UsageError(
                f"a ResNet has a depth of 6n + 2, got {self.depth}: choose 8, 14, 20, 32, 44, 56 "
                "or 110"
            )
        x = _conv_before_norm(self.width, dtype=self.dtype)(x)
        x = nn.relu(_norm(train, self.affine, self.dtype)(x))
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                width = self.width * 2**stage
                x = _BasicBlock(width, stride, self.affine, self.dtype)(x, train=train)
        return head(self.num_classes, self.dtype)(x.mean(axis=(1, 2)))


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman 2015): stages of 3×3 convolutions, each ending in a pooling.

    As usual for CIFAR, BatchNorm follows each convolution, and a single dense layer replaces three.
    It reads the mean over the remaining positions (the five poolings of VGG16 leave one of 32×32).
    Widths double from stage to stage, up to eight times the first. `stages` gives the number of
    convolutions in each; the default is VGG16, the paper's configuration D. On CPU use ``width=32``
    for it: XLA is very slow with 512 → 512 channels on 2×2 positions.
    """

    num_classes: int = 10
    width: int = 64
    affine: bool = True
    stages: tuple[int, ...] = (2, 2, 3, 3, 3)
    title: str = "vgg16"  # for errors
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, H, W, C) to logits (N, num_classes); H and W at least 2^len(stages)."""
        smallest = 2 ** len(self.stages)
        if min(x.shape[1:3]) < smallest:
            raise UsageError(
                f"{self.title} is made for {smallest}x{smallest} images, these are "
                f"{x.shape[1]}x{x.shape[2]}: choose larger ones, or cnn or resnet20"
            )
        for stage, convolutions in enumerate(self.stages):
            for _ in range(convolutions):
                width = self.width * 2 ** min(stage, 3)
                x = _conv_before_norm(width, dtype=self.dtype)(x)
                x = nn.relu(_norm(train, self.affine, self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return head(self.num_classes, self.dtype)(x.mean(axis=(1, 2)))


ResNet8 = functools.partial(ResNet, depth=8)
ResNet20 = functools.partial(ResNet, depth=20)
VGG16 = functools.partial(VGG, stages=(2, 2, 3, 3, 3), title="vgg16")
VGGMini = functools.partial(VGG, width=16, stages=(2, 2, 2), title="vgg-mini")


class Kind(NamedTuple):
    """How a model is made from (num_classes, width=..., dtype=...), and what it reads."""

    make: Callable[..., nn.Module]
    examples: Examples
    has_norm: bool  # then it also takes `affine`


MODELS = {
    "cnn": Kind(CNN, "images", False),
    "resnet20": Kind(ResNet20, "images", True),
    "vgg16": Kind(VGG16, "images", True),
    "vit": Kind(ViT, "images", True),
    "transformer": Kind(Transformer, "windows", True),
    "resnet8": Kind(ResNet8, "images", True),
    "vgg-mini": Kind(VGGMini, "images", True),
}


def check_model(name: str, dataset: str, examples: Examples) -> None:
    """Raises a `UsageError` unless `name` is a model for the examples of `dataset`."""
    check_choice("model", name, tuple(MODELS))
    fitting = [model for model, kind in MODELS.items() if kind.examples == examples]
    if name not in fitting:
        raise UsageError(
            f"{name} reads {MODELS[name].examples}, {dataset} has {examples}: choose --model "
            f"{' or '.join(fitting)}, or another --dataset"
        )


def make_model(
    name: str,
    num_classes: int,
    width: int | None = None,
    *,
    affine: bool = True,
    dtype: Dtype | None = None,
) -> nn.Module:
    """A model by its name.

    Args:
        name: one of `MODELS`.
        num_classes: number of logits.
        width: channels of the first convolution, or a transformer's features per position; None:
            the model's usual width.
        affine: whether BatchNorm and LayerNorm have a scale and a bias; `cnn` has neither norm.
        dtype: type to compute in, one of `DTYPES`; None: the type of inputs and parameters.
            Parameters, averages of BatchNorm and logits are float32 in any case.

    Returns:
        Module, called as (inputs, train=...).

    Raises:
        UsageError: unknown name or type.
    """
    check_choice("model", name, tuple(MODELS))
    kind = MODELS[name]
    options: dict[str, Any] = {} if width is None else {"width": width}
    if kind.has_norm:
        options["affine"] = affine
    if dtype is not None:
        options["dtype"] = _checked_dtype(dtype)
    return kind.make(num_classes, **options)


def _checked_dtype(dtype: Dtype) -> Dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    check_choice("dtype", name, DTYPES)
    return jnp.dtype(name)
