"""Table 3 and Figure 3 of the paper: ResNet20 on CIFAR-100.

100 epochs at batch 128, random crops and flips, learning rate × 0.1 every 40 epochs, three seeds.
64, 128 and 256 channels, as in the code that the paper refers to (the paper does not state the
width). The paper's figures: TEKFAC 77.04, TKFAC 76.73, EKFAC 73.98, Adam 73.70, SGDM 72.94 %.
Meant for a GPU: a run takes 100 × 390 steps, and 30 of them follow a search of 28 epochs for each
of ten optimizers (kfac-jax in an environment of its own).
``python -m benchmarks.paper table3_cifar100_resnet20 --data DIR``
"""

from benchmarks.experiments._grids import paper_entries
from benchmarks.training.experiment import Experiment, Published, Targets, TaskSpec
from benchmarks.training.halving import Rung
from benchmarks.training.loop import Schedule

EXPERIMENT = Experiment(
    title="Table 3, CIFAR-100, ResNet20",
    task=TaskSpec("cifar100", "resnet20", width=64, augment=True),
    entries=paper_entries(),
    epochs=100,
    schedule=Schedule(decay_every=40),
    rungs=(Rung(1, 4), Rung(2, 2), Rung(5, 1)),
    targets=Targets(train_loss=0.1, test_accuracy=0.7),
    published=Published(
        "Table 3 of Gao et al., arXiv:2011.13609",
        {
            "SGDM": (72.94, 0.11),
            "Adam": (73.7, 0.18),
            "EKFAC": (73.98, 0.21),
            "TKFAC": (76.73, 0.18),
            "TEKFAC": (77.04, 0.15),
        },
    ),
)
