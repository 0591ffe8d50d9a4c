"""An experiment of a few seconds, for the tests of runs, of `paper` and of `report`."""

import contextlib
import json
import sys
import types

import jax
import pytest

from benchmarks import experiments
from benchmarks.training.experiment import Entry, Experiment, RunSpec, Targets, TaskSpec
from benchmarks.training.halving import Rung
from benchmarks.training.loop import COSINE, Task, Trainer

TASK = TaskSpec("digits", "cnn", subset=320, width=4, batch_size=64)
TINY = Experiment(
    title="tiny",
    task=TASK,
    entries=(
        Entry("TEKFAC", "tekfac", {"learning_rate": (0.01, 0.03, 0.1), "damping": (1e-3, 1e-2)}),
        Entry("SGDM", "sgd", {"learning_rate": (0.03, 0.1, 0.3)}),
        Entry("fast", "sgd", {}, {"learning_rate": 1e30}),
    ),
    epochs=2,
    seeds=(0, 1),
    rungs=(Rung(1, 2), Rung(2, 1)),
    targets=Targets(train_loss=2.3, test_accuracy=0.3),
)


@contextlib.contextmanager
def only_tiny(tiny=TINY):
    """The experiment above in the place of those of the paper."""
    module = types.SimpleNamespace(EXPERIMENT=tiny, __doc__="Tiny.\n\nNothing else.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "names", lambda: ["tiny"])
        patch.setitem(sys.modules, "benchmarks.experiments.tiny", module)
        yield


def noise(key, images):
    return images + 0.1 * jax.random.normal(key, images.shape)


def make_trainer(task):
    """Augmentation, sampled labels and everything that is random in a step."""
    noisy = Task(task.dataset, task.model, task.batch_size, noise)
    settings = {"damping": 1e-3, "factor_interval": 2, "fisher": "sampled"}
    return Trainer(noisy, "tekfac", settings)


def spec(**changed):
    settings = {"learning_rate": 0.03, "damping": 1e-2, "factor_interval": 2, "fisher": "sampled"}
    return RunSpec(TASK, "TEKFAC", "tekfac", settings, 3, COSINE, 0, False)._replace(**changed)


def records(directory):
    return [json.loads(path.read_text()) for path in (directory / "runs").glob("*.json")]
