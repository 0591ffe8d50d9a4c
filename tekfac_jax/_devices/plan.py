"""Divides the eigendecompositions among devices, before anything runs."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from tekfac_jax._curvature.decomposition import SMALL
from tekfac_jax._layers.spec import Layers, LayerSpec, check_layers

_MOST_DEVICES = 2**20  # a plan lists them


class Assignment(NamedTuple):
    """One eigendecomposition.

    Attributes:
        path: of the layer.
        side: ``"phi"`` (inputs) or ``"psi"`` (outputs).
        which: index among the stacked layers and groups, flattened.
        dim: rows of the factor.
        device: the device that computes it.
    """

    path: str
    side: str
    which: int
    dim: int
    device: int


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """Which device computes which eigendecomposition; prints as a table.

    Attributes:
        devices: how many devices there are.
        assignments: every eigendecomposition, the largest first.
    """

    devices: int
    assignments: tuple[Assignment, ...]

    @property
    def loads(self) -> tuple[int, ...]:
        """For each device, the sum of dim³ over its decompositions."""
        loads = [0] * self.devices
        for one in self.assignments:
            loads[one.device] += one.dim**3
        return tuple(loads)

    @property
    def balance(self) -> float:
        """The largest load over the mean: 1 is perfect, the number of devices is the worst."""
        return max(self.loads) * self.devices / max(1, sum(self.loads))

    @property
    def bound(self) -> float:
        """A lower bound on the balance of any assignment: a decomposition cannot be divided.

        Among any k·devices + 1 of them, some k + 1 are on the same device.
        """
        cubes = sorted((one.dim**3 for one in self.assignments), reverse=True)
        meeting = [(k + 1) * cube for k, cube in enumerate(cubes[:: self.devices])]
        return max(1.0, max(meeting, default=0) * self.devices / max(1, sum(cubes)))

    def owners(self, path: str, side: str) -> np.ndarray:
        """The device of each of a layer's decompositions of one side."""
        own = [one for one in self.assignments if (one.path, one.side) == (path, side)]
        return np.array([one.device for one in sorted(own, key=lambda one: one.which)])

    def __repr__(self) -> str:
        lines = ["device  share  decompositions"]
        total = max(1, sum(self.loads))
        for device, load in enumerate(self.loads):
            own = [one.dim for one in self.assignments if one.device == device]
            dims = ", ".join(
                f"{len(list(same))}×{dim}" for dim, same in itertools.groupby(sorted(own)[::-1])
            )
            lines.append(f"{device:6}  {load / total:5.1%}  {dims}".rstrip())
        lines.append(
            f"{len(self.assignments)} decompositions; largest load over the mean "
            f"{self.balance:.2f}, at best {self.bound:.2f}"
        )
        return "\n".join(lines)


def device_plan(layers: Layers, devices: int) -> DevicePlan:
    """Which device decomposes what if the work is divided among that many devices.

    Every factor of every layer (each stacked layer and group counts by itself), the largest first,
    goes to the device with the smallest load so far: no load exceeds 4/3 of the best possible
    maximum (Graham 1969). Factors of one or two rows have a closed form and are not assigned.

    Args:
        layers: from `find_layers`.
        devices: how many devices, 1 or more.

    Returns:
        `DevicePlan`; print it.

    Raises:
        ValueError: `devices` is not a positive integer.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Sequential([nn.Dense(6), nn.Dense(4)]), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def loss_fn(params, x):
        ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
        >>> print(tekfac.device_plan(tekfac.find_layers(loss_fn, params, x), 2))
        device  share  decompositions
             0  48.5%  1×7, 1×4
             1  51.5%  2×6
        4 decompositions; largest load over the mean 1.03, at best 1.03
    """
    check_layers(layers)
    _check_devices(devices)
    # Largest first; the sort is stable and keeps the order of the layers among equals.
    work = [
        (side_dim, path, side, index)
        for path, spec in layers.items()
        for side, side_dim in _sides(spec)
        for index in range(math.prod(spec.lead))
        if side_dim > SMALL
    ]
    work.sort(key=lambda item: -item[0])
    loads = [0] * devices
    assignments: list[Assignment] = []
    for dim, path, side, index in work:
        device = loads.index(min(loads))
        loads[device] += dim**3
        assignments.append(Assignment(path, side, index, dim, device))
    return DevicePlan(devices, tuple(assignments))


def _check_devices(devices: object) -> None:
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices must be an integer, 1 or more, got {devices!r}")
    if devices > _MOST_DEVICES:
        raise ValueError(f"devices must be at most {_MOST_DEVICES:,}, got {devices:,}")


def _sides(spec: LayerSpec) -> list[tuple[str, int]]:
    """The sides whose factors are decomposed, with their dimensions."""
    return [("phi", spec.in_dim)] * spec.has_input_basis + [("psi", spec.out_dim)]
