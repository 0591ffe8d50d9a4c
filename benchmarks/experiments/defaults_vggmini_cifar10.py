"""Whether what helps a ResNet8 helps another network: damping and intervals on a VGG-mini.

A run of four epochs takes half a minute on two CPU cores: about ten minutes in all.
``python -m benchmarks.paper defaults_vggmini_cifar10 --data DIR``
"""

from benchmarks.experiments._grids import default_entries
from benchmarks.training.experiment import Experiment, TaskSpec
from benchmarks.training.halving import Rung

EXPERIMENT = Experiment(
    title="damping and intervals of TEKFAC, VGG-mini, 10,000 images of CIFAR-10",
    task=TaskSpec("cifar10", "vgg-mini", subset=10_000, width=8),
    entries=default_entries((0.03, 0.1, 0.3)),
    epochs=4,
    seeds=(0, 1),
    rungs=(Rung(1, 1),),
    view="ablation",
)
