"""All workloads by name."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.problems import images, pixels, tables, texts, views
from benchmarks.problems.workload import Workload


class Problem(NamedTuple):
    """How a workload is made from (name, steps, data directory), and what it needs."""

    make: Callable[[str, int, Path | None], Workload]
    steps: int
    needs: str | None = None  # a data set to be found in the data directory


# Lengths and sizes are such that Adam does not fit the set: where all do, no ratio is left.
PROBLEMS = {
    "digits-cnn": Problem(images.digits_cnn, 200),
    "resnet": Problem(images.resnet, 300, "CIFAR-10"),
    "vgg": Problem(images.vgg, 300, "CIFAR-100"),
    "vit": Problem(images.vit, 300, "CIFAR-10"),
    "mixer": Problem(images.mixer, 300, "CIFAR-10"),
    "deep-sets": Problem(images.deep_sets, 400),
    "language-model": Problem(texts.language_model, 300),
    "masked-lm": Problem(texts.masked_language_model, 400),
    "lstm": Problem(texts.lstm, 300),
    "chapters": Problem(texts.chapters, 200),
    "autoencoder": Problem(pixels.autoencoder, 400),
    "denoiser": Problem(pixels.denoiser, 300),
    "diffusion": Problem(pixels.diffusion, 400),
    "diabetes": Problem(tables.diabetes, 200),
    "photograph": Problem(tables.photograph, 400),
    "simclr": Problem(views.simclr, 300),
}


def make_workload(name: str, data: Path | None = None, steps_scale: float = 1.0) -> Workload:
    """A workload by its name; `steps_scale` shortens its runs.

    Raises:
        DataError: its data cannot be read.
    """
    problem = PROBLEMS[name]
    return problem.make(name, scaled_steps(name, steps_scale), data)


def scaled_steps(name: str, steps_scale: float) -> int:
    """Length of a run; 2 steps at least."""
    return max(2, round(PROBLEMS[name].steps * steps_scale))
