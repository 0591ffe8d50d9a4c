"""Table 3 and Figure 3 of the paper: ResNet20 on SVHN.

40 epochs at batch 128, no augmentation, learning rate × 0.1 every 20 epochs, three seeds.
64, 128 and 256 channels, as in the code that the paper refers to (the paper does not state the
width). The paper's figures: TEKFAC 96.45, TKFAC 96.20, EKFAC 95.16, Adam 95.93, SGDM 95.78 %.
Meant for a GPU: a run takes 40 × 572 steps, and 30 of them follow a search of 28 epochs for each
of ten optimizers (kfac-jax in an environment of its own).
``python -m benchmarks.paper table3_svhn_resnet20 --data DIR``
"""

from benchmarks.experiments._grids import paper_entries
from benchmarks.training.experiment import Experiment, Published, Targets, TaskSpec
from benchmarks.training.halving import Rung
from benchmarks.training.loop import Schedule

EXPERIMENT = Experiment(
    title="Table 3, SVHN, ResNet20",
    task=TaskSpec("svhn", "resnet20", width=64),
    entries=paper_entries(),
    epochs=40,
    schedule=Schedule(decay_every=20),
    rungs=(Rung(1, 4), Rung(2, 2), Rung(5, 1)),
    targets=Targets(train_loss=0.1, test_accuracy=0.95),
    published=Published(
        "Table 3 of Gao et al., arXiv:2011.13609",
        {
            "SGDM": (95.78, 0.15),
            "Adam": (95.93, 0.12),
            "EKFAC": (95.16, 0.07),
            "TKFAC": (96.2, 0.39),
            "TEKFAC": (96.45, 0.14),
        },
    ),
)
