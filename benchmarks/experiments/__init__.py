"""One module for each experiment; it holds an ``EXPERIMENT`` and says what it is for."""

import importlib
import pkgutil

from benchmarks.errors import check_choice
from benchmarks.training.experiment import Experiment

# First the readings for small machines, then the paper's, the most informative first.
ORDER = (
    "reading_resnet8_cifar10",
    "reading_vggmini_cifar10",
    "reading_digits",
    "half_resnet8_cifar10",
    "half_vggmini_cifar10",
    "ablation_cifar10",
    "defaults_digits",
    "defaults_vggmini_cifar10",
    "early_digits",
    "early_resnet8_cifar10",
    "sensitivity_cifar10",
    "table3_cifar10_resnet20",
    "table3_cifar100_resnet20",
    "table5_learning_rate",
    "table4_theta_floor",
    "table3_cifar10_vgg16",
    "table3_cifar100_vgg16",
    "table3_svhn_resnet20",
    "table3_svhn_vgg16",
)


def names() -> list[str]:
    """The experiments, in the order in which `all` runs them."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return [name for name in ORDER if name in found]


def load(name: str) -> tuple[Experiment, str]:
    """An experiment, and the docstring of its module.

    Raises:
        UsageError: there is no such experiment.
    """
    check_choice("experiment", name, tuple(names()))
    module = importlib.import_module(f"{__name__}.{name}")
    return module.EXPERIMENT, module.__doc__ or ""
