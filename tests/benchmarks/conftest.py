"""What several tests of the benchmarks need."""

import jax
import pytest

from benchmarks import paper
from tests.benchmarks.tiny import TASK, make_trainer, only_tiny


@pytest.fixture(autouse=True)
def standard_promotion():
    """Users' setting: optax.adam and flax's pooling rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def tiny():
    with only_tiny():
        yield


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """A finished experiment, run once."""
    directory = tmp_path_factory.mktemp("out")
    with only_tiny(), jax.numpy_dtype_promotion("standard"):
        paper.main(["tiny", "--out", str(directory)])
    return directory


@pytest.fixture(scope="session")
def tiny_task():
    return paper.make_task(TASK, None)


@pytest.fixture(scope="session")
def tiny_trainer(tiny_task):
    return make_trainer(tiny_task)
