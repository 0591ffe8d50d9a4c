"""Between a gradient pytree and the (*lead, in[+1], out) matrices of its layers."""

# pyright: reportUnknownMemberType=false
# JAX leaves the key paths that its functions return partially untyped.

from collections.abc import Mapping
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax  # pyright: ignore[reportMissingTypeStubs]

from tekfac_jax._layers.paths import flattened, join_path, parameter_path
from tekfac_jax._layers.spec import Layers, LayerSpec
from tekfac_jax._layers.types import KeyPath, Params, PyTree


def to_matrices(grads: Params, layers: Layers) -> dict[str, jax.Array]:
    """The gradient of each layer as a matrix; layers that are masked out are omitted.

    Args:
        grads: arrays and `optax.MaskedNode`, in the structure of argument 0.
        layers: from `find_layers`.

    Raises:
        ValueError: a parameter of a layer is missing, has another shape, or is masked out while
            the layer's other parameter is not.
    """
    found = _leaves_by_path(grads)
    matrices: dict[str, jax.Array] = {}
    for path, spec in layers.items():
        parts = _layer_leaves(path, spec, found)
        if parts is not None:
            matrices[path] = to_matrix(spec, *parts)
    return matrices


def from_matrices(grads: Params, layers: Layers, matrices: Mapping[str, jax.Array]) -> Params:
    """`grads` with the parameters of the layers in `matrices` replaced."""
    new: dict[str, jax.Array] = {}
    for path, matrix in matrices.items():
        spec = layers[path]
        kernel, bias = from_matrix(spec, matrix)
        new[parameter_path(path, spec.kernel_name)] = kernel
        if bias is not None:
            new[parameter_path(path, "bias")] = bias

    def replaced(path: KeyPath, leaf: PyTree) -> PyTree:
        name = join_path(path)
        return new[name].astype(leaf.dtype) if name in new else leaf

    return jax.tree_util.tree_map_with_path(replaced, grads, is_leaf=_is_absent)


def captured_mask(tree: Params, layers: Layers) -> PyTree:
    """A pytree like `tree`: True where a leaf belongs to one of the layers."""
    names = {
        parameter_path(path, name)
        for path, spec in layers.items()
        for name in spec.parameter_shapes()
    }

    def is_captured(path: KeyPath, leaf: PyTree) -> bool:
        return join_path(path) in names

    return jax.tree_util.tree_map_with_path(is_captured, tree)


def _is_absent(node: object) -> TypeGuard[optax.MaskedNode | None]:
    return node is None or isinstance(node, optax.MaskedNode)


def _is_array(leaf: object) -> TypeGuard[jax.Array]:
    """Whether it is an array, of JAX or NumPy."""
    return isinstance(leaf, jax.Array | np.ndarray)


def _leaves_by_path(tree: Params) -> dict[str, object]:
    found: dict[str, object] = {}
    for path, leaf in flattened(tree, "the gradient", is_leaf=_is_absent)[0]:
        name = join_path(path)
        if name in found:
            raise ValueError(f"two leaves of the gradient have the path {name!r}; rename one")
        found[name] = leaf
    return found


def _layer_leaves(
    path: str, spec: LayerSpec, found: Mapping[str, object]
) -> tuple[jax.Array, jax.Array | None] | None:
    """Kernel and bias gradient of a layer; None if the layer is masked out."""
    shapes = spec.parameter_shapes()
    leaves = {name: _lookup(parameter_path(path, name), found) for name in shapes}
    # A layer is one matrix: masked out altogether, or not at all.
    absent = [name for name, leaf in leaves.items() if leaf is None]
    if len(absent) == len(leaves):
        return None
    if absent:
        raise ValueError(
            f"layer {path!r} is preconditioned as a whole, but only its {absent[0]} is masked out; "
            "mask kernel and bias together, or leave the layer out with find_layers(..., skip=...)"
        )
    gradients = {
        name: _checked(parameter_path(path, name), leaves[name], shape)
        for name, shape in shapes.items()
    }
    return gradients[spec.kernel_name], gradients.get("bias")


def _lookup(name: str, found: Mapping[str, object]) -> object | None:
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


def _checked(name: str, leaf: object, shape: tuple[int, ...]) -> jax.Array:
    """The leaf; raises unless it is a floating-point array of that shape."""
    if not _is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        what = f"dtype {leaf.dtype}" if _is_array(leaf) else f"type {type(leaf).__name__}"
        raise ValueError(f"the gradient of {name!r} has {what}; it must be a floating-point array")
    if leaf.shape != shape:
        raise ValueError(
            f"the gradient of {name!r} has shape {leaf.shape}, but find_layers saw {shape}; call "
            "find_layers again for this network"
        )
    return leaf


def to_matrix(spec: LayerSpec, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Kernel and bias as (*lead, in[+1], out) matrices, with the bias as the last row."""
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
    """[..., rows, groups, d] -> [..., groups, rows, d], without the axis for one group."""
    return jnp.moveaxis(x, -2, -3) if spec.groups > 1 else x[..., 0, :]
