"""Several devices: how their sums and their eigendecompositions come together.

Every device has a part of the batch. Sums over examples are summed over devices before use.
Eigendecompositions, whose cost is the cube of a side, are divided among the devices: each is done
once.
"""

# pyright: reportUnknownMemberType=false
# JAX leaves `lax.psum` and parameters of `jnp.pad` and others untyped.

from typing import NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tekfac_jax._curvature.dense import Factors
from tekfac_jax._devices.plan import DevicePlan, device_plan
from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._layers.types import AxisName

T = TypeVar("T")
Packed: TypeAlias = jax.Array | tuple[jax.Array, jax.Array, jax.Array]


class Devices(NamedTuple):
    """The devices on which an update runs, as seen by one of them.

    Attributes:
        axis_name: the axis of `pmap` or `shard_map` that they form; None: there is only one.
        plan: which device decomposes what; None: each device decomposes everything.
        split: whether each has a part of the batch, so that their sums must be added up.
    """

    axis_name: AxisName | None = None
    plan: DevicePlan | None = None
    split: bool = False

    def total(self, sums: T) -> T:
        """The sum over devices of each device's sums over examples."""
        return _psum(sums, self.axis_name) if self.split else sums

    def total_of_factors(self, sums: Factors, spec: LayerSpec) -> Factors:
        """The same for Φ and Ψ; of a symmetric matrix only one triangle is sent."""
        if not self.split:
            return sums
        if not spec.has_input_basis:  # Φ is a vector: nothing to pack
            psi = _unpack(self.total(_pack(sums.psi)))
            return Factors(self.total(sums.phi), psi)
        phi, psi = self.total((_pack(sums.phi), _pack(sums.psi)))
        return Factors(_unpack(phi), _unpack(psi))

    def is_mine(self, path: str, side: str, lead: tuple[int, ...]) -> jax.Array | None:
        """Which of a layer's factors this device decomposes, (*lead); None: all of them.

        Factors too small for the plan go to the first device.
        """
        if self.plan is None or self.axis_name is None:
            return None
        owners = self.plan.owners(path, side)
        owners = owners.reshape(lead) if owners.size else np.zeros(lead, int)
        return jnp.asarray(owners, jnp.int32) == lax.axis_index(self.axis_name)

    def gathered(self, bases: T) -> T:
        """All bases, from those of each device, which has zeros for the others'."""
        return bases if self.plan is None else _psum(bases, self.axis_name)


def devices_of(layers: Layers, axis_name: AxisName | None, *, split: bool) -> Devices:
    """The devices of an axis, inside `pmap` or `shard_map`."""
    if axis_name is None:
        return Devices()
    number = int(_psum(1, axis_name))  # psum of a constant is a Python number
    plan = device_plan(layers, number) if number > 1 else None
    return Devices(axis_name, plan, split)


def _psum(tree: T, axis_name: AxisName | None) -> T:
    return cast(T, lax.psum(tree, axis_name))


def _pack(x: jax.Array) -> Packed:
    """A symmetric matrix [[A, Bᵀ], [B, C]] as B, one square for both A and C, and a diagonal.

    A is k×k, and C is k×k or one row smaller. The upper triangle of the square, with the diagonal,
    holds A; the rest holds the lower triangle of C, whose diagonal is kept separately. Together
    these are d(d+1)/2 numbers, and half a row more for odd d.
    """
    if x.shape[-1] == 1:
        return x
    k = (x.shape[-1] + 1) // 2
    a, b, c = x[..., :k, :k], x[..., k:, :k], x[..., k:, k:]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, a.shape[-1] - c.shape[-1])] * 2
    both = jnp.triu(a) + jnp.tril(jnp.pad(c, padding), -1)
    return b, both, cast(jax.Array, jnp.diagonal(c, axis1=-2, axis2=-1))


def _unpack(packed: Packed) -> jax.Array:
    """Inverse of `_pack`."""
    if not isinstance(packed, tuple):
        return packed
    b, both, diagonal = packed
    size = diagonal.shape[-1]
    a = jnp.triu(both) + jnp.triu(both, 1).mT
    lower = jnp.tril(both, -1)[..., :size, :size]
    c = lower + lower.mT + diagonal[..., :, None] * jnp.eye(size, dtype=b.dtype)
    return jnp.block([[a, b.mT], [b, c]])
