"""All optimizers, tuned alike, on a narrow ResNet8 and 10,000 images of CIFAR-10.

Each one has its own defaults; only the learning rate is tuned, over three decades. On two idle CPU
cores a step takes about 85 ms, and a run of eight epochs with its evaluation 65 s: about an hour in
all. kfac-jax needs an environment of its own, see `benchmarks.training.kfac_jax_trainer`.
``python -m benchmarks.paper reading_resnet8_cifar10 --data DIR``
"""

from benchmarks.experiments._grids import tuned_entries
from benchmarks.training.experiment import Experiment, Targets, TaskSpec
from benchmarks.training.halving import Rung

EXPERIMENT = Experiment(
    title="narrow ResNet8 on 10,000 images of CIFAR-10, every optimizer tuned",
    task=TaskSpec("cifar10", "resnet8", subset=10_000, width=8),
    entries=tuned_entries(7),
    epochs=8,
    rungs=(Rung(1, 2), Rung(2, 1)),
    targets=Targets(train_loss=1.2, test_accuracy=0.55),
)
