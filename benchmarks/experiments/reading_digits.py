"""All optimizers, tuned alike, on a small CNN and scikit-learn's digits; kfac-jax is one of them.

Each one has its own defaults; only the learning rate is tuned, over three decades. A run takes a
few seconds: about ten minutes in all on two CPU cores. kfac-jax needs an environment of its own,
see `benchmarks.training.kfac_jax_trainer`.
``python -m benchmarks.paper reading_digits``
"""

from benchmarks.experiments._grids import tuned_entries
from benchmarks.training.experiment import Experiment, Targets, TaskSpec
from benchmarks.training.halving import Rung

EXPERIMENT = Experiment(
    title="small CNN on digits, every optimizer tuned",
    task=TaskSpec("digits", "cnn"),
    entries=tuned_entries(7),
    epochs=10,
    rungs=(Rung(2, 2), Rung(4, 1)),
    targets=Targets(train_loss=0.1, test_accuracy=0.97),
)
