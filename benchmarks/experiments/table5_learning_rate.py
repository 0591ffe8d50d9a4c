"""Table 5 and Figure 4 of the paper: learning rate of TEKFAC, ResNet20 on CIFAR-100.

The paper's figures, for rates from 1e-4 to 0.1 in decades: 76.38, 77.04, 76.08, 72.47 %.
ϑ is 0.01. 100 epochs at batch 128, random crops and flips, learning rate × 0.1 every 40
epochs, three seeds. Meant for a GPU: 12 runs of 39,000 steps, no search.
``python -m benchmarks.paper table5_learning_rate --data DIR``
"""

from benchmarks.experiments._grids import PAPER
from benchmarks.training.experiment import Entry, Experiment, Published, TaskSpec
from benchmarks.training.loop import Schedule

VALUES = (1e-3, 1e-4, 1e-2, 1e-1)
FIXED = {**PAPER, "damping": "trace", "trace_floor": 1e-2}

EXPERIMENT = Experiment(
    title="Table 5, CIFAR-100, ResNet20, TEKFAC by learning rate",
    task=TaskSpec("cifar100", "resnet20", width=64, augment=True),
    entries=tuple(
        Entry(f"rate={value:g}", "tekfac", {}, {**FIXED, "learning_rate": value})
        for value in VALUES
    ),
    epochs=100,
    schedule=Schedule(decay_every=40),
    view="sweep",
    axes=("learning_rate",),
    published=Published(
        "Table 5 of Gao et al., arXiv:2011.13609",
        {
            "rate=0.0001": (76.38, 0.15),
            "rate=0.001": (77.04, 0.15),
            "rate=0.01": (76.08, 0.14),
            "rate=0.1": (72.47, 0.23),
        },
    ),
)
