"""Table 3 and Figure 3 of the paper: VGG16 on SVHN.

40 epochs at batch 128, no augmentation, learning rate × 0.1 every 20 epochs, three seeds.
The paper's figures: TEKFAC 95.93, TKFAC 95.75, EKFAC 95.87, Adam 95.80, SGDM 94.98 %.
Meant for a GPU: a run takes 40 × 572 steps, and 30 of them follow a search of 28 epochs for each
of ten optimizers (kfac-jax in an environment of its own).
``python -m benchmarks.paper table3_svhn_vgg16 --data DIR``
"""

from benchmarks.experiments._grids import paper_entries
from benchmarks.training.experiment import Experiment, Published, Targets, TaskSpec
from benchmarks.training.halving import Rung
from benchmarks.training.loop import Schedule

EXPERIMENT = Experiment(
    title="Table 3, SVHN, VGG16",
    task=TaskSpec("svhn", "vgg16", width=64),
    entries=paper_entries(),
    epochs=40,
    schedule=Schedule(decay_every=20),
    rungs=(Rung(1, 4), Rung(2, 2), Rung(5, 1)),
    targets=Targets(train_loss=0.1, test_accuracy=0.95),
    published=Published(
        "Table 3 of Gao et al., arXiv:2011.13609",
        {
            "SGDM": (94.98, 0.09),
            "Adam": (95.8, 0.11),
            "EKFAC": (95.87, 0.13),
            "TKFAC": (95.75, 0.21),
            "TEKFAC": (95.93, 0.16),
        },
    ),
)
