"""Type aliases for what users pass in: pytrees, optimizer states, names of device axes."""

from typing import Any, TypeAlias

import jax
import numpy as np

PyTree: TypeAlias = Any  # anything JAX can flatten; its structure is the user's
TreeDef: TypeAlias = Any  # a jax.tree_util.PyTreeDef, for which jaxlib has no types
Params: TypeAlias = PyTree  # parameters, or gradients and updates of the same structure
OptState: TypeAlias = PyTree  # an optax state that contains ours, at any depth
Key: TypeAlias = Any  # one entry of a JAX key path
KeyPath: TypeAlias = tuple[Key, ...]  # from the root of a pytree to a leaf
DType: TypeAlias = Any  # anything `jnp.dtype` takes
Shaped: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # with or without values
AxisName: TypeAlias = str | tuple[str, ...]  # one axis of pmap, shard_map or a mesh, or several
