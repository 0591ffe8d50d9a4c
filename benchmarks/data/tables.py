"""A table that comes with scikit-learn, standardised and divided."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split


class Table(NamedTuple):
    """Rows of features (N, features), and the number to be predicted from each (N,)."""

    train_inputs: NDArray[np.float32]
    train_targets: NDArray[np.float32]
    test_inputs: NDArray[np.float32]
    test_targets: NDArray[np.float32]


def read_diabetes() -> Table:
    """442 patients, ten features; the progress of the disease after a year."""
    inputs, targets = load_diabetes(return_X_y=True)
    (train, test), (train_targets, test_targets) = _divided(np.asarray(inputs), np.asarray(targets))
    known = train_targets
    return Table(
        _standardised(train, train), _standardised(train_targets, known),
        _standardised(test, train), _standardised(test_targets, known),
    )  # fmt: skip


def _divided(*arrays: NDArray[Any]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Each array as (training, test); a fifth of the rows is for the test."""
    found: Any = train_test_split(*arrays, test_size=0.2, random_state=0)
    return list(zip(found[::2], found[1::2], strict=True))


def _standardised(values: NDArray[Any], by: NDArray[Any]) -> NDArray[np.float32]:
    """Values with the mean and the deviation of `by` taken out, column by column."""
    return ((values - by.mean(axis=0)) / by.std(axis=0)).astype(np.float32)
