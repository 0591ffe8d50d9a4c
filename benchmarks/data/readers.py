"""What the readers of image files share: their return types, subsets and checks."""

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import DataError, check_subset

# What a truncated or foreign file can raise when it is read.
DAMAGE = (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile,
          zlib.error)  # fmt: skip


class Split(NamedTuple):
    """Images (N, height, width, channels) and labels (N,), both uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


class Moments(NamedTuple):
    """Mean and standard deviation of a training set per channel, pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class RawImages(NamedTuple):
    """A data set as it is on disk, its training set shuffled and cut to the subset."""

    train: Split
    test: Split
    moments: Moments  # of the whole training set


class Source(NamedTuple):
    """A data set that is read from a directory."""

    title: str
    num_classes: int
    files: str  # what the directory may hold, in words
    read: Callable[[Path, int | None], RawImages]  # (directory, subset)


def joined(parts: Iterable[Split]) -> Split:
    """Concatenates the parts in their order."""
    images, labels = zip(*parts, strict=True)
    return Split(np.concatenate(images), np.concatenate(labels))


def shuffled(split: Split, subset: int | None, where: str) -> Split:
    """The first `subset` examples in a fixed random order; smaller subsets are part of larger."""
    check_subset(subset, len(split.labels), where)
    order = np.random.default_rng(0).permutation(len(split.labels))[:subset]
    return Split(split.images[order], split.labels[order])


def moments(images: NDArray[np.uint8], where: Path | str, title: str) -> Moments:
    """Mean and deviation per channel, exact up to rounding, from the counts of the 256 values.

    Raises:
        DataError: a channel has a single value and cannot be standardised.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256))
    # In chunks: counting converts bytes to integers of eight times the size.
    for start in range(0, len(images), 1000):
        for channel in range(channels):
            pixels = images[start : start + 1000, ..., channel]
            counts[channel] += np.bincount(pixels.ravel(), minlength=256)
    values, weights = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(1))
    if not std.all():
        raise damaged(where, title, "all pixels are the same")
    return Moments(tuple(mean.tolist()), tuple(std.tolist()))


def check_directory(directory: Path, files: str) -> None:
    """Raises a `DataError` unless `directory` is one."""
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not a directory: pass with --data the one that holds {files}"
        )


def checked_labels(
    labels: NDArray, num_classes: int, title: str, where: Path | str, *, lowest: int = 0
) -> NDArray[np.uint8]:
    """Labels (N,) as uint8; the first class is `lowest`.

    Raises:
        DataError: there are no labels, or some lie outside the classes.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise damaged(where, title, f"labels of shape {labels.shape} and type {labels.dtype}")
    highest = lowest + num_classes - 1
    if labels.min() < lowest or labels.max() > highest:
        raise DataError(
            f"{where} has labels from {labels.min()} to {labels.max()} where {title} has "
            f"{num_classes} classes, {lowest} to {highest}: put the right file there"
        )
    return labels.astype(np.uint8)


def damaged(where: Path | str, title: str, why: object) -> DataError:
    """The error for a file that cannot be read."""
    reason = " ".join(str(why).split()) or type(why).__name__
    return DataError(f"{where} is damaged or not a file of {title} ({reason}): fetch it again")
