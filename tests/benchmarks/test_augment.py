"""Augmentation against a loop over the images, and batches made ahead."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.data.augment import AUGMENTED, crop_and_flip
from benchmarks.data.prefetch import prefetch
from benchmarks.data.sets import DATASETS
from benchmarks.errors import UsageError
from benchmarks.models.convnets import CNN
from benchmarks.pipeline import measure


def numbered(shape):
    """Every pixel another number, none of them zero: a pixel says where it comes from."""
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def origins(images, augmented, padding):
    """For each image the one (row, column, flipped) that explains it, by trying all of them."""
    height, width = images.shape[1:3]
    found = []
    for image, result in zip(images, augmented, strict=True):
        padded = np.zeros((height + 2 * padding, width + 2 * padding, image.shape[2]), image.dtype)
        padded[padding : padding + height, padding : padding + width] = image
        matches = []
        for row, column in itertools.product(range(2 * padding + 1), repeat=2):
            crop = padded[row : row + height, column : column + width]
            matches += [
                (row, column, flipped)
                for flipped in (False, True)
                if np.array_equal(result, crop[:, ::-1] if flipped else crop)
            ]
        assert len(matches) == 1, matches
        found += matches
    return found


@pytest.fixture(scope="module")
def many():
    """Where 512 images are cropped, of a height and a width that differ."""
    images = numbered((512, 6, 5, 2))
    augmented = jax.jit(crop_and_flip, static_argnames="padding")(
        jax.random.key(3), images, padding=1
    )
    assert augmented.shape == images.shape
    assert augmented.dtype == images.dtype
    return np.array(origins(images, np.asarray(augmented), 1))


def test_every_crop_and_flip_occurs_as_often_as_the_others(many):
    # 18 outcomes, each binomial with n = 512, p = 1/18: 28.4 ± 5.2. Five deviations on each side.
    counts = np.bincount(many @ np.array([6, 2, 1]), minlength=18)
    assert counts.min() > 28.4 - 5 * 5.2
    assert counts.max() < 28.4 + 5 * 5.2


def test_row_column_and_flip_are_independent(many):
    # Correlations of 512 independent pairs deviate from zero by 0.044.
    correlations = np.corrcoef(many.astype(float).T)
    assert abs(correlations - np.eye(3)).max() < 5 * 0.044


def test_padding_of_cifar():
    images = numbered((4, 32, 32, 3))
    places = origins(images, np.asarray(crop_and_flip(jax.random.key(0), images)), 4)
    assert len(set(places)) == 4


def test_the_key_decides():
    images = numbered((16, 8, 8, 1))
    first, again, other = (crop_and_flip(jax.random.key(seed), images) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_half_precision_stays():
    images = jnp.ones((2, 4, 4, 1), jnp.bfloat16)
    assert crop_and_flip(jax.random.key(0), images, padding=1).dtype == jnp.bfloat16


def test_negative_padding_is_refused():
    with pytest.raises(UsageError, match="padding must be 0 or more pixels, got -1: choose"):
        crop_and_flip(jax.random.key(0), numbered((1, 4, 4, 1)), padding=-1)


def test_only_natural_images_are_augmented():
    assert AUGMENTED == ("cifar10", "cifar100")
    assert set(AUGMENTED) < set(DATASETS)


# --- batches made ahead ------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_same_batches_in_the_same_order_on_the_device(size):
    given = [(np.full(3, i), np.full((), i)) for i in range(5)]
    read = list(prefetch(given, size))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(read))
    np.testing.assert_equal(jax.device_get(read), given)
    assert list(prefetch([], size)) == []
    assert not threads()


def test_next_batches_are_made_while_one_is_in_use():
    made = threading.Semaphore(0)

    def batches():
        for i in range(10):
            made.release()
            yield np.int32(i)

    ahead = prefetch(batches())
    next(ahead)
    for _ in range(3):  # the one in use, and two more
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.05)  # no further ones
    ahead.close()


def test_exception_comes_in_its_turn():
    def batches():
        yield np.int32(0)
        yield np.int32(1)
        raise OSError("the disk is gone")

    ahead = prefetch(batches(), 5)
    assert [int(next(ahead)), int(next(ahead))] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert not threads()


def test_consumer_may_stop_early():
    taken = []

    def batches():
        for i in itertools.count():
            taken.append(i)
            yield np.int32(i)

    for batch in (ahead := prefetch(batches(), 2)):
        if batch == 3:
            break
    ahead.close()
    assert not threads()
    assert len(taken) <= 7  # four that were used, and no more than what was under way


def test_nothing_made_ahead_is_refused():
    with pytest.raises(UsageError, match="size must be 1 or more batches made ahead, got 0"):
        prefetch([], 0)


def test_cost_of_the_pipeline_is_measured():
    with jax.numpy_dtype_promotion("standard"):
        times = measure(CNN(width=2), batch_size=2, rounds=3)
    assert list(times) == ["step alone", "with the pipeline", "made ahead"]
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in times.values())
    assert not threads()
