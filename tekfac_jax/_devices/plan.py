"""TODO: _devices/plan"""

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
        which: of the stacked layers or groups, counted through.
        dim: rows of the factor.
        device: who does it.
    """

    path: str
    side: str
    which: int
    dim: int
    device: int


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """Which device does which eigendecomposition; prints as a table.

    Attributes:
        devices: how many there are.
        assignments: every eigendecomposition, the largest first.
    """

    devices: int
    assignments: tuple[Assignment, ...]

    @property
    def loads(self) -> tuple[int, ...]:
        """For each device the sum of dim³ of its decompositions."""
        loads = [0] * self.devices
        for share in self.assignments:
            loads[share.device] += share.dim**3
        return tuple(loads)

    @property
    def balance(self) -> float:
        """The largest load over the mean: 1 is perfect, and the number of devices the worst."""
        return max(self.loads) * self.devices / max(1, sum(self.loads))

    @property
    def bound(self) -> float:
        """No assignment has a better balance: a decomposition cannot be divided.

        Of any k·devices + 1 of them some k + 1 meet on one device.
        """
        cubes = sorted((share.dim**3 for share in self.assignments), reverse=True)
        meeting = [(k + 1) * cube for k, cube in enumerate(cubes[:: self.devices])]
        return max(1.0, max(meeting, default=0) * self.devices / max(1, sum(cubes)))

    def owners(self, path: str, side: str) -> np.ndarray:
        """The device for each of a layer's decompositions of one side."""
        own = [share for share in self.assignments if (share.path, share.side) == (path, side)]
        return np.array([share.device for share in sorted(own, key=lambda share: share.which)])

    def __repr__(self) -> str:
        lines = ["device  share  decompositions"]
        total = max(1, sum(self.loads))
        for device, load in enumerate(self.loads):
            own = [share.dim for share in self.assignments if share.device == device]
            dims = ", ".join(
                f"{len(list(same))}×{dim}" for dim, same in itertools.groupby(sorted(own)[::-1])
            )
            lines.append(f"{device:6}  {load / total:5.1%}  {dims}".rstrip())
        lines.append(
            f"{len(self.assignments)} decompositions; largest load over the mean {self.balance:.2f}, "
            f"at best {self.bound:.2f}"
        )
        return "\n".join(lines)


def device_plan(layers: Layers, devices: int) -> DevicePlan:
    """Who decomposes what where the work is shared out over so many devices.

    Every factor of every layer (stacked layers and groups count one by one), the largest first,
    to the device that has least to do: no device has more than 4/3 of the best possible (Graham
    1969). Factors of one or two rows have a closed form and are not shared out.

    Args:
        layers: from `find_layers`.
        devices: how many, 1 or more.

    Returns:
        `DevicePlan`; print it.

    Raises:
        ValueError: `devices` is no positive integer.

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
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices must be a whole number, 1 or more, got {devices!r}")
    if devices > _MOST_DEVICES:
        raise ValueError(f"devices must be at most {_MOST_DEVICES:,}, got {devices:,}")
    work = [
        (side_dim, path, side, index)
        for path, spec in layers.items()
        for side, side_dim in _sides(spec)
        for index in range(math.prod(spec.lead))
        if side_dim > SMALL
    ]
    work.sort(key=lambda item: -item[0])  # stable: the order of the layers among equals
    loads = [0] * devices
    shares = []
    for dim, path, side, index in work:
        device = loads.index(min(loads))
        loads[device] += dim**3
        shares.append(Assignment(path, side, index, dim, device))
    return DevicePlan(devices, tuple(shares))


def _sides(spec: LayerSpec) -> list[tuple[str, int]]:
    """The sides whose factor is decomposed, with their dimension."""
    return [("phi", spec.in_dim)] * spec.has_input_basis + [("psi", spec.out_dim)]
