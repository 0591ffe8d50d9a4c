"""Test accuracy over learning rate, ϑ and intervals for TEKFAC, beside Adam over learning rate.

The paper's Figure 4 (a) and Tables 4 and 5 on a small scale: a narrow ResNet8 and 10,000 images. A
run takes 25 s on two CPU cores: a quarter of an hour in all.
``python -m benchmarks.paper sensitivity_cifar10 --data DIR``
"""

from benchmarks.experiments._grids import half_decades
from benchmarks.training.experiment import Entry, Experiment, TaskSpec

RATES = half_decades(1e-3, 7)
SETTINGS = ((50, 1e-2), (50, 1e-4), (50, 1.0), (10, 1e-2))  # T, ϑ


def _tekfac(interval: int, floor: float, rate: float) -> Entry:
    fixed = {
        "factor_interval": interval,
        "eigenbasis_interval": interval,
        "rescaling_interval": interval,
        "damping": "trace",
        "trace_floor": floor,
        "learning_rate": rate,
    }
    return Entry(f"TEKFAC T={interval} floor={floor:g} rate={rate:g}", "tekfac", {}, fixed)


EXPERIMENT = Experiment(
    title="sensitivity of TEKFAC and Adam, narrow ResNet8, 10,000 images of CIFAR-10",
    task=TaskSpec("cifar10", "resnet8", subset=10_000, width=8),
    entries=(
        *(Entry(f"Adam rate={rate:g}", "adam", {}, {"learning_rate": rate}) for rate in RATES),
        *(_tekfac(*settings, rate) for settings in SETTINGS for rate in RATES),
    ),
    epochs=3,
    seeds=(0,),
    view="sweep",
    axes=("learning_rate", "trace_floor", "factor_interval"),
)
