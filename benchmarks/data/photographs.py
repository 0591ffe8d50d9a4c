"""Two photographs that come with scikit-learn, in grey, and small patches of them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_image

_NAMES = ("china.jpg", "flower.jpg")
_TRAIN_SHARE = 0.8  # of the columns, from the left; the others are for validation


class Photographs(NamedTuple):
    """Grey images (height, width) with pixels in 0..1, float32."""

    train: list[NDArray[np.float32]]
    test: list[NDArray[np.float32]]


def read_photographs() -> Photographs:
    """Both photographs; the right part of each is for validation."""
    grey = [(load_sample_image(name).mean(axis=-1) / 255).astype(np.float32) for name in _NAMES]
    cuts = [round(_TRAIN_SHARE * image.shape[1]) for image in grey]
    return Photographs(
        [image[:, :cut] for image, cut in zip(grey, cuts, strict=True)],
        [image[:, cut:] for image, cut in zip(grey, cuts, strict=True)],
    )


def patches(
    images: list[NDArray[np.float32]], number: int, size: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Square patches (number, size, size, 1) at random places, of each image equally many."""
    found = np.empty((number, size, size, 1), np.float32)
    for i in range(number):
        image = images[i % len(images)]
        y, x = (rng.integers(side - size + 1) for side in image.shape)
        found[i, :, :, 0] = image[y : y + size, x : x + size]
    return found
