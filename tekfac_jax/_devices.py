"""Several devices: who decomposes what, and how the parts come together.

Every device has a part of the batch. What is summed over examples is summed over devices before
it is used; eigendecompositions, which cost the cube of a side, are shared out: each is done once.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from tekfac_jax._decomposition import SMALL
from tekfac_jax._layers import Layers, LayerSpec, Statistics, check_layers

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


class Devices(NamedTuple):
    """The devices that an update runs on, as one of them sees it.

    Attributes:
        axis_name: the axis of `pmap` or `shard_map` that they make up; None: there is only one.
        plan: who decomposes what; None: each everything.
        split: whether each has a part of the batch, so that sums must be added up.
    """

    axis_name: Any = None
    plan: DevicePlan | None = None
    split: bool = False

    def total(self, sums: Any) -> Any:
        """The sum over devices of each device's sums over examples."""
        if not self.split:
            return sums
        return lax.psum(sums, self.axis_name)

    def total_of_factors(self, sums: Any, spec: LayerSpec) -> Any:
        """The same for Φ and Ψ: of symmetric matrices only one triangle travels."""
        if not self.split:
            return sums
        matrices = sums if spec.has_input_basis else sums._replace(phi=None)
        packed = lax.psum(jax.tree.map(_pack, matrices), self.axis_name)
        total = jax.tree.map(_unpack, matrices, packed)
        return total if spec.has_input_basis else total._replace(phi=self.total(sums.phi))

    def is_mine(self, path: str, side: str, lead: tuple[int, ...]) -> jax.Array | None:
        """Which of a layer's factors this device decomposes, (*lead); None: all of them.

        Those that are not shared out, since they are small, fall to the first device.
        """
        if self.plan is None:
            return None
        owners = self.plan.owners(path, side)
        owners = owners.reshape(lead) if owners.size else np.zeros(lead, int)
        return jnp.asarray(owners, jnp.int32) == lax.axis_index(self.axis_name)

    def gathered(self, bases: Any) -> Any:
        """Bases of which each device has some and zeros for the others: all of them."""
        return bases if self.plan is None else lax.psum(bases, self.axis_name)


def devices_of(layers: Layers, axis_name: Any, *, split: bool) -> Devices:
    """The devices of an axis, inside `pmap` or `shard_map`."""
    if axis_name is None:
        return Devices()
    number = lax.psum(1, axis_name)  # of a constant: a Python number
    plan = device_plan(layers, int(number)) if number > 1 else None
    return Devices(axis_name, plan, split)


def specs_of_statistics(stats: Any, layers: Layers, mesh: jax.sharding.Mesh, axis: Any) -> Any:
    """For `jax.shard_map`: captures are split along their examples; sums are whole.

    Raises:
        ValueError: the batch cannot be divided among the devices of the axis.
    """
    if not isinstance(stats, Statistics):
        return PartitionSpec()
    devices = math.prod(mesh.shape[name] for name in axis_names(axis))
    for path, captures in stats.layers.items():
        size = captures[0].u.shape[len(layers[path].stack)]
        if size % devices:
            raise ValueError(
                f"a batch of {size} examples cannot be divided among the {devices} devices of mesh "
                f"axis {axis!r}: fill it up to a multiple with examples whose loss is multiplied "
                "by 0, and pass the number of the others to value_grad_and_stats as reduction= "
                "and examples="
            )
    parts: Any = {
        path: PartitionSpec(*[None] * len(layers[path].stack), axis) for path in stats.layers
    }
    whole: Any = PartitionSpec()
    return Statistics(parts, whole, whole, whole)


def axis_names(axis: Any) -> tuple[str, ...]:
    """The names of one axis, or of several."""
    return axis if isinstance(axis, tuple) else (axis,)


def _pack(x: jax.Array) -> Any:
    """A symmetric matrix [[A, Bᵀ], [B, C]] as B, one rectangle for both A and C, and a diagonal.

    A is k×k and C at most as large: A's triangle with its diagonal goes above, C's below, and the
    diagonal of C beside. Together d(d+1)/2 numbers, for odd d half a row more.
    """
    if x.shape[-1] == 1:
        return x
    k = (x.shape[-1] + 1) // 2
    a, b, c = x[..., :k, :k], x[..., k:, :k], x[..., k:, k:]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, a.shape[-1] - c.shape[-1])] * 2
    both = jnp.triu(a) + jnp.tril(jnp.pad(c, padding), -1)
    return b, both, jnp.diagonal(c, axis1=-2, axis2=-1)


def _unpack(like: jax.Array, packed: Any) -> jax.Array:
    if like.shape[-1] == 1:
        return packed
    b, both, diagonal = packed
    rest = diagonal.shape[-1]
    a = jnp.triu(both) + jnp.triu(both, 1).mT
    lower = jnp.tril(both, -1)[..., :rest, :rest]
    c = lower + lower.mT + diagonal[..., :, None] * jnp.eye(rest, dtype=b.dtype)
    return jnp.block([[a, b.mT], [b, c]])
