"""Between a gradient pytree and the (*lead, in[+1], out) matrices of its layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tekfac_jax._layers.paths import flattened, join_path, parameter_path
from tekfac_jax._layers.spec import Layers, LayerSpec


def to_matrices(grads: Any, layers: Layers) -> dict[str, jax.Array]:
    """The gradient of each layer as a matrix; layers that are masked out are left out.

    Args:
        grads: pytree of the structure of argument 0, of arrays and `optax.MaskedNode`.
        layers: from `find_layers`.

    Raises:
        ValueError: a layer's parameter is missing, has another shape, or is masked alone.
    """
    found = _leaves_by_path(grads)
    matrices = {}
    for path, spec in layers.items():
        parts = _layer_leaves(path, spec, found)
        if parts is not None:
            matrices[path] = to_matrix(spec, *parts)
    return matrices


def from_matrices(grads: Any, layers: Layers, matrices: dict[str, jax.Array]) -> Any:
    """`grads` with the parameters of the layers in `matrices` replaced."""
    new = {}
    for path, matrix in matrices.items():
        spec = layers[path]
        kernel, bias = from_matrix(spec, matrix)
        new[parameter_path(path, spec.kernel_name)] = kernel
        if bias is not None:
            new[parameter_path(path, "bias")] = bias
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=_is_absent)
    leaves = [
        new[name].astype(leaf.dtype) if (name := join_path(path)) in new else leaf
        for path, leaf in paths_and_leaves
    ]
    return jax.tree.unflatten(treedef, leaves)


def captured_mask(tree: Any, layers: Layers) -> Any:
    """A pytree like `tree`: True where a leaf belongs to one of the layers."""
    names = set()
    for path, spec in layers.items():
        names |= {parameter_path(path, name) for name in spec.parameter_shapes()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: join_path(path) in names, tree)


def _is_absent(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    paths_and_leaves, _ = flattened(tree, "the gradient", is_leaf=_is_absent)
    found: dict[str, Any] = {}
    for path, leaf in paths_and_leaves:
        name = join_path(path)
        if name in found:
            raise ValueError(f"two leaves of the gradient have the path {name!r}; rename one")
        found[name] = leaf
    return found


def _layer_leaves(
    path: str, spec: LayerSpec, found: dict[str, Any]
) -> tuple[jax.Array, jax.Array | None] | None:
    """Kernel and bias gradient of a layer; None if the layer is masked out."""
    shapes = spec.parameter_shapes()
    leaves = {name: _lookup(parameter_path(path, name), found) for name in shapes}
    absent = [name for name, leaf in leaves.items() if leaf is None]
    if len(absent) == len(leaves):
        return None
    if absent:
        raise ValueError(
            f"layer {path!r} is preconditioned as a whole, but its {absent[0]} is masked out "
            "alone; mask kernel and bias together, or leave the layer out with "
            "find_layers(..., skip=...)"
        )
    for name, shape in shapes.items():
        leaf: Any = leaves[name]
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating):
            what = f"dtype {leaf.dtype}" if is_array else f"type {type(leaf).__name__}"
            raise ValueError(
                f"the gradient of {parameter_path(path, name)!r} has {what}; it must be an array "
                "of floating-point numbers"
            )
        if leaf.shape != shape:
            raise ValueError(
                f"the gradient of {parameter_path(path, name)!r} has shape {leaves[name].shape}, "
                f"find_layers saw {shape}; call find_layers again for this network"
            )
    return leaves[spec.kernel_name], leaves.get("bias")


def _lookup(name: str, found: dict[str, Any]) -> Any:
    """The leaf of that path; None if it, or a subtree around it, is masked out."""
    if name in found:
        return None if _is_absent(found[name]) else found[name]
    parts = name.split("/")
    for end in range(len(parts)):
        ancestor = "/".join(parts[:end]) or "~"
        if ancestor in found and _is_absent(found[ancestor]):
            return None
    raise ValueError(
        f"the gradient has no leaf {name!r}, which find_layers saw; the gradient must have the "
        "structure of the function's argument 0"
    )


def to_matrix(spec: LayerSpec, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Kernel and bias as (*lead, in[+1], out) matrices, the bias as the last row of each."""
    front = range(len(spec.stack))
    kernel = jnp.moveaxis(kernel, spec.kernel_stack, front)
    matrix = _groups_first(spec, kernel.reshape(*spec.stack, -1, spec.groups, spec.out_dim))
    if bias is None:
        return matrix
    bias = jnp.moveaxis(bias, spec.bias_stack, front)
    row = _groups_first(spec, bias.reshape(*spec.stack, 1, spec.groups, spec.out_dim))
    return jnp.concatenate([matrix, row.astype(matrix.dtype)], axis=-2)


def from_matrix(spec: LayerSpec, matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Inverse of `to_matrix`."""
    front = range(len(spec.stack))

    def parameter(rows: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
        if spec.groups > 1:
            rows = jnp.moveaxis(rows, -3, -2)
        return jnp.moveaxis(rows.reshape(*spec.stack, *shape), front, axes)

    if not spec.use_bias:
        return parameter(matrix, spec.kernel_shape, spec.kernel_stack), None
    kernel, bias = matrix[..., :-1, :], matrix[..., -1:, :]
    return (
        parameter(kernel, spec.kernel_shape, spec.kernel_stack),
        parameter(bias, spec.bias_shape, spec.bias_stack),
    )


def _groups_first(spec: LayerSpec, x: jax.Array) -> jax.Array:
    """[..., rows, groups, d] -> [..., groups, rows, d], without the axis if there is one group."""
    return jnp.moveaxis(x, -2, -3) if spec.groups > 1 else x[..., 0, :]
