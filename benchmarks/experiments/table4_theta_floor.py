"""Table 4 and Figure 4 of the paper: ϑ of TEKFAC, ResNet20 on CIFAR-100.

The paper's figures, for ϑ from 1e-4 to 100 in decades: 76.81, 76.65, 77.04, 76.71, 76.03, 74.74,
73.68 %. The learning rate is 0.001. 100 epochs at batch 128, random crops and flips, learning rate
× 0.1 every 40 epochs, three seeds. Meant for a GPU: 21 runs of 39,000 steps, no search.
``python -m benchmarks.paper table4_theta_floor --data DIR``
"""

from benchmarks.experiments._grids import PAPER
from benchmarks.training.experiment import Entry, Experiment, Published, TaskSpec
from benchmarks.training.loop import Schedule

VALUES = (1e-2, 1e-4, 1e-3, 1e-1, 1.0, 10.0, 100.0)
FIXED = {**PAPER, "damping": "trace", "learning_rate": 1e-3}

EXPERIMENT = Experiment(
    title="Table 4, CIFAR-100, ResNet20, TEKFAC by ϑ",
    task=TaskSpec("cifar100", "resnet20", width=64, augment=True),
    entries=tuple(
        Entry(f"floor={value:g}", "tekfac", {}, {**FIXED, "trace_floor": value}) for value in VALUES
    ),
    epochs=100,
    schedule=Schedule(decay_every=40),
    view="sweep",
    axes=("trace_floor",),
    published=Published(
        "Table 4 of Gao et al., arXiv:2011.13609",
        {
            "floor=0.0001": (76.81, 0.28),
            "floor=0.001": (76.65, 0.12),
            "floor=0.01": (77.04, 0.15),
            "floor=0.1": (76.71, 0.17),
            "floor=1": (76.03, 0.26),
            "floor=10": (74.74, 0.11),
            "floor=100": (73.68, 0.09),
        },
    ),
)
