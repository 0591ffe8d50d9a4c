"""All optimizers, tuned alike, on VGG-mini and 10,000 images of CIFAR-10.

Each one has its own defaults; only the learning rate is tuned, over three decades. On two CPU cores
a step takes 70 to 85 ms, and a run of six epochs with its evaluation about 45 s: about 50 minutes
in all. kfac-jax needs an environment of its own, see `benchmarks.training.kfac_jax_trainer`.
``python -m benchmarks.paper reading_vggmini_cifar10 --data DIR``
"""

from benchmarks.experiments._grids import tuned_entries
from benchmarks.training.experiment import Experiment, Targets, TaskSpec
from benchmarks.training.halving import Rung

EXPERIMENT = Experiment(
    title="VGG-mini on 10,000 images of CIFAR-10, every optimizer tuned",
    task=TaskSpec("cifar10", "vgg-mini", subset=10_000, width=8),
    entries=tuned_entries(7),
    epochs=6,
    rungs=(Rung(1, 2), Rung(2, 1)),
    targets=Targets(train_loss=1.2, test_accuracy=0.55),
)
