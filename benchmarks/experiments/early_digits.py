"""What refreshes in the first steps are worth in a short run: a small CNN on digits, 110 steps.

Takes about a minute on two CPU cores.
``python -m benchmarks.paper early_digits``
"""

from benchmarks.experiments._grids import early_entries, half_decades
from benchmarks.training.experiment import Experiment, Targets, TaskSpec
from benchmarks.training.halving import Rung

EXPERIMENT = Experiment(
    title="early refreshes of TEKFAC, small CNN, digits",
    task=TaskSpec("digits", "cnn"),
    entries=early_entries(half_decades(1e-2, 4)),
    epochs=10,
    seeds=(0, 1, 2, 3, 4),
    rungs=(Rung(4, 1),),
    targets=Targets(train_loss=0.1, test_accuracy=0.97),
)
