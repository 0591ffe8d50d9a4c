"""Classification of images: convolutional networks, a vision transformer, a mixer, a set."""

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.sets import Dataset, load_dataset
from benchmarks.models.convnets import CNN, ResNet8, VGGMini
from benchmarks.models.mixer import Mixer
from benchmarks.models.pooled import DeepSets
from benchmarks.models.transformers import ViT
from benchmarks.problems.workload import Workload, classification

_TRAIN, _TEST = 10_000, 2_000  # images of CIFAR: enough for a few hundred steps, read in seconds
_POINTS = 32  # of each digit


@functools.cache
def _cifar(name: str, data: Path | None) -> Dataset:
    """Read once for all workloads on it."""
    found = load_dataset(name, data, _TRAIN)
    return found._replace(
        test_inputs=found.test_inputs[:_TEST].copy(),  # a view would keep the others in memory
        test_labels=found.test_labels[:_TEST].copy(),
    )


def _train(data: Dataset) -> tuple[NDArray, NDArray]:
    return data.train_inputs, data.train_labels


def _test(data: Dataset) -> tuple[NDArray, NDArray]:
    return data.test_inputs, data.test_labels


def digits_cnn(name: str, steps: int, data: Path | None) -> Workload:
    """The CNN of the benchmarks on scikit-learn's digits."""
    del data
    digits = load_dataset("digits")
    return classification(
        name, steps, CNN(), _train(digits), _test(digits), batch_size=32, small=True
    )


def resnet(name: str, steps: int, data: Path | None) -> Workload:
    """A narrow ResNet8 with BatchNorm on CIFAR-10."""
    cifar = _cifar("cifar10", data)
    return classification(name, steps, ResNet8(width=8), _train(cifar), _test(cifar), batch_size=48)


def vgg(name: str, steps: int, data: Path | None) -> Workload:
    """A narrow VGG of six convolutions with BatchNorm on CIFAR-100."""
    cifar, model = _cifar("cifar100", data), VGGMini(num_classes=100, width=12)
    return classification(name, steps, model, _train(cifar), _test(cifar), batch_size=32)


def vit(name: str, steps: int, data: Path | None) -> Workload:
    """A vision transformer with a class token and a head that starts at zero, on CIFAR-10."""
    cifar = _cifar("cifar10", data)
    model = ViT(width=48, depth=3, patch=8, class_token=True, zero_head=True)
    return classification(name, steps, model, _train(cifar), _test(cifar), batch_size=64)


def mixer(name: str, steps: int, data: Path | None) -> Workload:
    """An MLP-Mixer on CIFAR-10."""
    cifar = _cifar("cifar10", data)
    model = Mixer(width=48, depth=2)
    return classification(name, steps, model, _train(cifar), _test(cifar), batch_size=64)


def deep_sets(name: str, steps: int, data: Path | None) -> Workload:
    """Digits as sets of their brightest pixels, each with its row, column and brightness."""
    del data
    digits = load_dataset("digits")
    train, test = points(digits.train_inputs), points(digits.test_inputs)
    return classification(
        name, steps, DeepSets(10), (train, digits.train_labels), (test, digits.test_labels),
        batch_size=128, small=True,
    )  # fmt: skip


def points(images: NDArray) -> NDArray[np.float32]:
    """The `_POINTS` brightest pixels of images (N, H, W, 1), as (N, _POINTS, 3)."""
    number, height, width, _ = images.shape
    flat = images.reshape(number, -1)
    chosen = np.argsort(-flat, axis=1, kind="stable")[:, :_POINTS]
    rows, columns = np.unravel_index(chosen, (height, width))
    place = [2 * axis / (side - 1) - 1 for axis, side in ((rows, height), (columns, width))]
    return np.stack([*place, np.take_along_axis(flat, chosen, 1)], axis=-1).astype(np.float32)
