"""Several devices: who decomposes what, and how the parts come together.

Every device has a part of the batch. What is summed over examples is summed over devices before
it is used; eigendecompositions, which cost the cube of a side, are shared out: each is done once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tekfac_jax._devices.plan import DevicePlan, device_plan
from tekfac_jax._layers.spec import Layers, LayerSpec


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
