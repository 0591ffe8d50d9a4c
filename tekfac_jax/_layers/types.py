"""Type aliases for what users hand in: pytrees, optimizer states, names of device axes."""

from typing import Any, TypeAlias

PyTree: TypeAlias = Any  # what JAX can flatten; its structure is the user's
Params: TypeAlias = PyTree  # parameters, or gradients and updates of their structure
OptState: TypeAlias = PyTree  # an optax state with ours inside, however deep
Key: TypeAlias = Any  # an entry of one of JAX's key paths
DType: TypeAlias = Any  # what `jnp.dtype` takes
AxisName: TypeAlias = str | tuple[str, ...]  # of pmap, shard_map or a mesh; or several together
