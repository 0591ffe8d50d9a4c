"""Table 3 and Figure 3 of the paper: VGG16 on CIFAR-100.

100 epochs at batch 128, random crops and flips, learning rate × 0.1 every 40 epochs, three seeds.
The paper's figures: TEKFAC 71.37, TKFAC 70.82, EKFAC 70.41, Adam 69.47, SGDM 67.29 %.
Meant for a GPU: a run takes 100 × 390 steps, and 30 of them follow a search of 28 epochs for each
of ten optimizers (kfac-jax in an environment of its own).
``python -m benchmarks.paper table3_cifar100_vgg16 --data DIR``
"""

from benchmarks.experiments._grids import paper_entries
from benchmarks.training.experiment import Experiment, Published, Targets, TaskSpec
from benchmarks.training.halving import Rung
from benchmarks.training.loop import Schedule

EXPERIMENT = Experiment(
    title="Table 3, CIFAR-100, VGG16",
    task=TaskSpec("cifar100", "vgg16", width=64, augment=True),
    entries=paper_entries(),
    epochs=100,
    schedule=Schedule(decay_every=40),
    rungs=(Rung(1, 4), Rung(2, 2), Rung(5, 1)),
    targets=Targets(train_loss=0.1, test_accuracy=0.7),
    published=Published(
        "Table 3 of Gao et al., arXiv:2011.13609",
        {
            "SGDM": (67.29, 0.28),
            "Adam": (69.47, 0.25),
            "EKFAC": (70.41, 0.26),
            "TKFAC": (70.82, 0.12),
            "TEKFAC": (71.37, 0.18),
        },
    ),
)
