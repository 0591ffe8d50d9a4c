"""Fashion-MNIST (Xiao et al. 2017) from its IDX files, compressed or not, as uint8.

IDX is the format of MNIST: two zero bytes, the element type (8: unsigned byte), the number of axes,
the length of each axis as a big-endian 32-bit integer, then the elements with the last axis running
fastest.
"""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.readers import (
    DAMAGE,
    RawImages,
    Source,
    Split,
    check_directory,
    checked_labels,
    damaged,
    moments,
    shuffled,
)
from benchmarks.errors import DataError

_TITLE = "Fashion-MNIST"
_CLASSES = 10
_UNSIGNED_BYTES = 8
_NAMES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
_DOWNLOAD = "https://github.com/zalandoresearch/fashion-mnist"
_FILES = f"{', '.join(_NAMES[:-1])} and {_NAMES[-1]}, each as it is or as .gz ({_DOWNLOAD})"


def read_fashion_mnist(directory: Path, subset: int | None) -> RawImages:
    """60,000 training and 10,000 test images of 28×28×1; errors as in `load_dataset`."""
    check_directory(directory, _FILES)
    found = {name: _find(directory, name) for name in _NAMES}
    paths = [path for path in found.values() if path is not None]
    if not paths:
        raise DataError(f"no {_TITLE} in {directory}: it must hold {_FILES}")
    if len(paths) < len(_NAMES):
        missing = next(name for name, path in found.items() if path is None)
        raise DataError(f"{directory} lacks {missing}, compressed or not: get it from {_DOWNLOAD}")
    train, test = _read(*paths[:2]), _read(*paths[2:])
    measured = moments(train.images, paths[0], _TITLE)
    return RawImages(shuffled(train, subset, f"{_TITLE} in {directory}"), test, measured)


def _find(directory: Path, name: str) -> Path | None:
    candidates = (directory / name, directory / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read(images_path: Path, labels_path: Path) -> Split:
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise damaged(images_path, _TITLE, f"images of {images.shape[1]}x{images.shape[2]}")
    if len(labels) != len(images):
        raise damaged(labels_path, _TITLE, f"{len(labels)} labels for {len(images)} images")
    return Split(images[..., None], checked_labels(labels, _CLASSES, _TITLE, labels_path))


def _read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        header = struct.Struct(f">HBB{axes}I")
        if len(content) < header.size:
            raise ValueError(f"{len(content)} bytes")
        zero, kind, ndim, *shape = header.unpack_from(content)
        if (zero, kind, ndim) != (0, _UNSIGNED_BYTES, axes):
            raise ValueError(f"it begins with {content[:4].hex(' ')}")
        if len(content) != header.size + math.prod(shape):
            raise ValueError(f"{len(content)} bytes, {header.size + math.prod(shape)} expected")
    except DAMAGE as error:
        raise damaged(path, _TITLE, error) from error
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


SOURCES = {"fashion_mnist": Source(_TITLE, _CLASSES, _FILES, read_fashion_mnist)}
