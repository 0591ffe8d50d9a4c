"""Times steps in turn in one process, on images with the spectrum of natural ones."""

import itertools
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.models.convnets import CNN, VGG16, ResNet20
from benchmarks.models.transformers import ViT

BATCHES = 8  # used in turn: the curvature must change, or a refresh has nothing to do


class MLP(nn.Module):
    """784-512-256-10, without BatchNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (N, 28, 28, 1) to logits (N, 10)."""
        del train
        x = x.reshape(x.shape[0], -1)
        for width in (512, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


# name -> (model, shape of an image)
MODELS: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {
    "mlp": (MLP(), (28, 28, 1)),
    "cnn": (CNN(), (8, 8, 1)),
    "resnet20": (ResNet20(), (32, 32, 3)),
    "resnet20-wide": (ResNet20(width=64), (32, 32, 3)),
    "vgg16-half": (VGG16(width=32), (32, 32, 3)),
    "vgg16": (VGG16(), (32, 32, 3)),
    "vit": (ViT(), (32, 32, 3)),
}


def random_images(shape: tuple[int, int, int], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian images whose amplitudes fall with frequency, and random labels 0 to 9.

    In natural images they fall as 1/f (Field 1987). This matters: for white noise all eigenvalues
    are equal, and no basis is better than another.
    """
    rng = np.random.default_rng(0)
    height, width, channels = shape
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    amplitudes = 1 / np.maximum(frequencies, 1 / max(height, width))
    noise = np.fft.fft2(rng.normal(size=(number, channels, height, width)))
    images = np.fft.ifft2(noise * amplitudes).real.transpose(0, 2, 3, 1)
    labels = rng.integers(10, size=number)
    return (images / images.std()).astype(np.float32), labels.astype(np.int32)


def in_turn(steps: Mapping[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each step, `rounds` times in turn: a slow minute of the machine hits them all."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for _, (name, step) in itertools.product(range(rounds), steps.items()):
        times[name].append(step())
    return times


def ratios(times: Mapping[Any, list[float]], base: Any) -> dict[Any, dict[str, Any]]:
    """For each step the median and the quartiles of its ratio to `base` in the same round."""
    found = {}
    for name, values in times.items():
        of_rounds = [value / own for value, own in zip(values, times[base], strict=True)]
        low, median, high = np.quantile(of_rounds, [0.25, 0.5, 0.75])
        found[name] = {"ratio": float(median), "quartiles": [float(low), float(high)]}
    return found


# Tflop/s of float32 operands on tensor cores (TF32, dense), which XLA uses on these GPUs for
# products at default precision; from NVIDIA's data sheets, where the sparse rate is twice that.
_TERAFLOPS = {
    "A100": 156.0,
    "H100": 494.7,
    "H200": 494.7,
}


def peak_teraflops(device_kind: str) -> float | None:
    """The arithmetic peak of a device by its name, in Tflop/s; None if it is not in the list."""
    known = [rate for name, rate in _TERAFLOPS.items() if name in device_kind]
    return known[0] if known else None


def settings() -> dict[str, Any]:
    """The machine and its jax, for the record."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "jax": jax.__version__,
    }


def draw(results: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Bars on a logarithmic axis: for each model the ratios by name."""
    matplotlib.use("Agg")
    names = list(dict.fromkeys(name for bars in results.values() for name in bars))
    figure, axes = plt.subplots(
        1, len(results), figsize=(1 + 3 * len(results), 1 + 0.3 * len(names)), squeeze=False,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for axis, (model, bars) in zip(axes[0], results.items(), strict=True):
        values = [bars.get(name, np.nan) for name in names]
        drawn = axis.barh(names, values, color=["C0" if "tekfac" in n else "C7" for n in names])
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=model, xlabel="steps of SGD with momentum")
        axis.margins(x=0.25)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)
