"""Whether what helps a ResNet8 helps another network: damping and intervals on digits.

A CNN without BatchNorm. Takes a minute or two on two CPU cores.
``python -m benchmarks.paper defaults_digits``
"""

from benchmarks.experiments._grids import default_entries
from benchmarks.training.experiment import Experiment, TaskSpec
from benchmarks.training.halving import Rung

EXPERIMENT = Experiment(
    title="damping and intervals of TEKFAC, small CNN, digits",
    task=TaskSpec("digits", "cnn", batch_size=64),
    entries=default_entries((0.01, 0.03, 0.1, 0.3)),
    epochs=8,
    seeds=(0, 1, 2),
    rungs=(Rung(4, 1),),
    view="ablation",
)
