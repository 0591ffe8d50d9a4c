"""Street View House Numbers (Netzer et al. 2011), the cropped digits, as uint8."""

from pathlib import Path

import numpy as np
import scipy.io

from benchmarks.data.readers import (
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

_TITLE = "SVHN"
_CLASSES = 10
_NAMES = ("train_32x32.mat", "test_32x32.mat")
_DOWNLOAD = "http://ufldl.stanford.edu/housenumbers/"
_FILES = f"{' and '.join(_NAMES)} ({_DOWNLOAD})"


def read_svhn(directory: Path, subset: int | None) -> RawImages:
    """73,257 training and 26,032 test images of 32×32×3; errors as in `load_dataset`."""
    check_directory(directory, _FILES)
    paths = [directory / name for name in _NAMES]
    missing = [path.name for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        raise DataError(f"no {_TITLE} in {directory}: it must hold {_FILES}")
    if missing:
        raise DataError(f"{directory} lacks {missing[0]}: download it from {_DOWNLOAD}")
    train, test = map(_read, paths)
    measured = moments(train.images, paths[0], _TITLE)
    return RawImages(shuffled(train, subset, f"{_TITLE} in {directory}"), test, measured)


def _read(path: Path) -> Split:
    try:
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
        images, labels = content["X"], content["y"]
        if images.shape[:3] != (32, 32, 3) or images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"X of shape {images.shape} and type {images.dtype}")
        if labels.shape != (images.shape[3], 1):
            raise ValueError(f"{images.shape[3]} images, y of shape {labels.shape}")
    # On corrupted lengths and types scipy raises nearly any exception.
    except Exception as error:
        raise damaged(path, _TITLE, error) from error
    labels = checked_labels(labels[:, 0], _CLASSES, _TITLE, path, lowest=1)
    # Classes are counted from 1, as in Matlab: class 10 is the digit 0.
    return Split(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels % 10)


SOURCES = {"svhn": Source(_TITLE, _CLASSES, _FILES, read_svhn)}
