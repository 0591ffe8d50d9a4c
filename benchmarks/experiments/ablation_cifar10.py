"""What each part of TEKFAC is worth, changed one at a time: narrow ResNet8, CIFAR-10.

The first entry has the paper's damping. Each other one differs by what its name says, and takes its
learning rate from the same three values. Sampled labels cost a second forward and backward pass in
every step here, more than necessary: compare epochs for that entry, not seconds. A run of four
epochs takes 35 s on two CPU cores, and most entries need a compilation: about 45 minutes in all.
``python -m benchmarks.paper ablation_cifar10 --data DIR``
"""

from typing import Any

from benchmarks.experiments._grids import intervals
from benchmarks.training.experiment import Entry, Experiment, TaskSpec
from benchmarks.training.halving import Rung


def _entry(label: str, optimizer: str = "tekfac", **changed: Any) -> Entry:
    fixed = {"damping_scale": 1.0, **changed}  # the paper's rule, not the library's default
    return Entry(label, optimizer, {"learning_rate": (0.03, 0.1, 0.3)}, fixed)


EXPERIMENT = Experiment(
    title="ablations of TEKFAC, narrow ResNet8, 10,000 images of CIFAR-10",
    task=TaskSpec("cifar10", "resnet8", subset=10_000, width=8),
    entries=(
        _entry("base: damping scale 1, intervals 50"),
        _entry("location factors", factors="location"),
        _entry("running rescaling", rescaling="running"),
        _entry("sampled Fisher", fisher="sampled"),
        _entry("every layer its own damping", fc_damping="own"),
        _entry("no KL clip", kl_clip=None),
        _entry("damping scale 0.3", damping_scale=0.3),
        _entry("damping scale 0.1", damping_scale=0.1),
        _entry("intervals 10", **intervals(10)),
        _entry("intervals 1", **intervals(1)),
        _entry("intervals 10 and damping scale 0.1", damping_scale=0.1, **intervals(10)),
        _entry("rescaling interval 200", rescaling_interval=200),
        _entry("basis rank auto", basis_rank="auto"),
        _entry("no momentum", momentum=0.0),
        _entry("momentum first", "tekfac-momentum-first"),
        _entry("32 examples", statistics_examples=32),
        _entry("no transport", "tekfac-without-transport"),
    ),
    epochs=4,
    seeds=(0, 1),
    rungs=(Rung(1, 1),),
    view="ablation",
)
