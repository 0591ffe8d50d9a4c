"""Data sets: scikit-learn's digits, CIFAR-10 and CIFAR-100, SVHN, Fashion-MNIST, and a book."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.data import cifar, fashion_mnist, svhn
from benchmarks.data.readers import Moments, Split
from benchmarks.data.text import read_alice
from benchmarks.errors import DataError, check_subset

__all__ = ["DATASETS", "DataError", "Dataset", "Examples", "load_dataset"]

Examples = Literal["images", "windows"]  # windows of a text

_ON_DISK = cifar.SOURCES | svhn.SOURCES | fashion_mnist.SOURCES
# name -> what its examples are
DATASETS: dict[str, Examples] = {
    "digits": "images",
    **dict.fromkeys(cifar.SOURCES, "images"),
    "alice": "windows",
    **dict.fromkeys((*svhn.SOURCES, *fashion_mnist.SOURCES), "images"),
}
_DIGITS_TEST = 360  # a fifth of the 1797 images


class Dataset(NamedTuple):
    """Inputs and labels.

    Images are (N, height, width, channels) in float32, standardised with mean and deviation of
    the whole training set, and have labels (N,). Windows are (N, length) of characters as int32,
    and their labels, (N, length), the characters that follow.
    """

    name: str
    train_inputs: NDArray[np.float32] | NDArray[np.int32]
    train_labels: NDArray[np.int32]
    test_inputs: NDArray[np.float32] | NDArray[np.int32]
    test_labels: NDArray[np.int32]
    num_classes: int  # of a text: its number of distinct characters
    examples: Examples = "images"


def load_dataset(name: str, data: Path | str | None = None, subset: int | None = None) -> Dataset:
    """Reads a data set.

    Args:
        name: one of `DATASETS`.
        data: directory with the files of CIFAR, SVHN or Fashion-MNIST. Digits come with
            scikit-learn and alice lies beside this module: neither needs a directory.
        subset: keep only that many training examples. The order is shuffled with a fixed seed: a
            subset is a fair sample, and a smaller subset is part of a larger one.

    Returns:
        `Dataset`.

    Raises:
        DataError: unknown name, missing or damaged file, unexpected classes, or `subset` larger
            than the training set.
    """
    if name == "digits":
        return _digits(subset)
    if name == "alice":
        train, test, num_characters = read_alice(subset)
        return Dataset(name, *train, *test, num_characters, "windows")
    if name not in _ON_DISK:
        raise DataError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    source = _ON_DISK[name]
    if data is None:
        raise DataError(
            f"{name} is read from a directory: pass with --data the one that holds {source.files}"
        )
    raw = source.read(Path(data), subset)
    train, test = _standardised(raw.train, raw.moments), _standardised(raw.test, raw.moments)
    return Dataset(name, *train, *test, source.num_classes)


def _standardised(split: Split, moments: Moments) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Images and labels as the networks read them."""
    pixels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = _standardise(pixels, moments.mean, moments.std)  # (256, channels)
    images = np.empty(split.images.shape, np.float32)
    # A table lookup: arithmetic would hold all of SVHN three times in float32.
    for channel, values in enumerate(table.T):
        images[..., channel] = values[split.images[..., channel]]
    return images, split.labels.astype(np.int32)


def _digits(subset: int | None) -> Dataset:
    features, targets = load_digits(return_X_y=True)
    images = np.asarray(features, np.float32).reshape(-1, 8, 8, 1) / 16
    labels = np.asarray(targets, np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_TEST, stratify=labels, random_state=0
    )
    check_subset(subset, len(train), "digits")
    mean, std = images[train].mean(), images[train].std()
    images = _standardise(images, mean, std)
    kept = train[:subset]
    return Dataset("digits", images[kept], labels[kept], images[test], labels[test], 10)


def _standardise(pixels: NDArray, mean: ArrayLike, std: ArrayLike) -> NDArray[np.float32]:
    """Pixels in 0..1, scaled to mean 0 and deviation 1."""
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
