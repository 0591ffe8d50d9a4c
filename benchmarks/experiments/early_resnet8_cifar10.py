"""What refreshes in the first steps are worth: a narrow ResNet8 on CIFAR-10, 312 steps.

A run takes 35 s on two CPU cores: about a quarter of an hour in all.
``python -m benchmarks.paper early_resnet8_cifar10 --data DIR``
"""

from benchmarks.experiments._grids import early_entries
from benchmarks.training.experiment import Experiment, TaskSpec
from benchmarks.training.halving import Rung

EXPERIMENT = Experiment(
    title="early refreshes of TEKFAC, narrow ResNet8, 10,000 images of CIFAR-10",
    task=TaskSpec("cifar10", "resnet8", subset=10_000, width=8),
    entries=early_entries((0.03, 0.1, 0.3)),
    epochs=4,
    rungs=(Rung(1, 1),),
    view="ablation",
)
