"""Flax's layer types: which are supported, and how one call becomes a `LayerSpec`."""

import itertools
import string
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes

from tekfac_jax._layers import LayerSpec, call_positions, replace


def describe(kind: type, module: Any, x: Any, y: Any, kernel: Any) -> LayerSpec | str:
    """The spec of a call (without a path), or why the layer cannot be captured.

    Args:
        kind: the layer's type in `flax.linen`.
        module: the layer, or whatever has the attributes of one.
        x: its input.
        y: its output.
        kernel: its kernel.
    """
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return f"its kernel is {kernel.dtype}, not a real floating-point array"
    if module.promote_dtype is not dtypes.promote_dtype:
        return "it has a promote_dtype of its own"
    fields = _FIELDS[kind](module, x)
    if isinstance(fields, str):
        return fields
    spec = LayerSpec(
        path="",
        kernel_shape=tuple(kernel.shape),
        use_bias=getattr(module, "use_bias", False),
        dtype=jnp.dtype(kernel.dtype).name,
        **fields,
    )
    return replace(spec, positions=call_positions(spec, y.shape))


def _describe_dense(module: Any, x: Any) -> dict[str, Any] | str:
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    axes = tuple(sorted(axis % x.ndim for axis in axes))
    if module.batch_dims:
        return "it has batch_dims: one kernel for each index"
    return _dense_fields(module, x, axes)


def _dense_fields(module: Any, x: Any, axes: tuple[int, ...]) -> dict[str, Any] | str:
    if module.dot_general is not None or module.dot_general_cls is not None:
        return "it has a dot_general of its own"
    if 0 in axes:
        return "its input has no batch axis in front of what it contracts"
    axes = tuple(axis - x.ndim for axis in axes)
    return {"kind": "dense", "contracted": len(axes), "axes": axes}


def _describe_einsum(module: Any, x: Any) -> dict[str, Any] | str:
    """An einsum that contracts some axes of its input and puts the new ones last."""
    if module.einsum_str is None:
        return "its einsum_str is given at the call"
    equation = module.einsum_str.replace(" ", "")
    inputs, kernel, output = equation.replace("->", ",").split(",")
    unused = (c for c in string.ascii_letters if c not in equation)
    further = "".join(itertools.islice(unused, x.ndim - len(inputs.replace("...", ""))))
    inputs, output = (letters.replace("...", further) for letters in (inputs, output))
    contracted = [c for c in kernel if c in inputs and c not in output]
    features = [c for c in kernel if c not in inputs]
    kept = [c for c in inputs if c not in contracted]
    if list(kernel) != contracted + features or list(output) != kept + features:
        return f"its einsum {equation!r} is not a contraction with the new axes last, in order"
    axes = tuple(inputs.index(c) for c in contracted)
    if not axes or 0 in axes:
        return "its input has no batch axis in front of what it contracts"
    return {
        "kind": "dense", "contracted": len(axes), "axes": tuple(a - x.ndim for a in axes)
    }  # fmt: skip


def _describe_conv(module: Any, x: Any) -> dict[str, Any] | str:
    window = _tuple(module.kernel_size, 1)
    rank = len(window)
    if module.mask is not None:
        return "its kernel is masked"
    if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
        return "it has a conv_general_dilated of its own"
    if x.ndim < rank + 2:
        return "its input has no batch axis"
    return {
        "kind": "conv",
        "contracted": rank + 1,
        "groups": int(module.feature_group_count),
        "strides": _tuple(module.strides, rank),
        "dilation": _tuple(module.kernel_dilation, rank),
        "input_dilation": _tuple(module.input_dilation, rank),
        "padding": _padding(module.padding, rank),
    }


def _describe_conv_transpose(module: Any, x: Any) -> dict[str, Any] | str:
    """A convolution whose input is spread by the strides (`jax.lax.conv_transpose`)."""
    window = _tuple(module.kernel_size, 1)
    rank = len(window)
    if module.mask is not None:
        return "its kernel is masked"
    if module.transpose_kernel:
        return "its kernel is transposed (transpose_kernel=True)"
    if module.padding == "CIRCULAR":
        return "it has circular padding"
    if x.ndim < rank + 2:
        return "its input has no batch axis"
    strides, dilation = _tuple(module.strides, rank), _tuple(module.kernel_dilation, rank)
    padding = _padding(module.padding, rank)
    if isinstance(padding, str):
        extent = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        padding = tuple(map(_transposed_padding, extent, strides, [padding] * rank))
    return {
        "kind": "conv",
        "contracted": rank + 1,
        "strides": (1,) * rank,
        "dilation": dilation,
        "input_dilation": strides,
        "padding": padding,
    }


def _transposed_padding(extent: int, stride: int, padding: str) -> tuple[int, int]:
    """Padding that makes the output as large as the input of the convolution it transposes."""
    if padding == "SAME":
        total = extent + stride - 2
        low = extent - 1 if stride > extent - 1 else -(-total // 2)
    else:  # VALID
        total = extent + stride - 2 + max(extent - stride, 0)
        low = extent - 1
    return low, total - low


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    """Flax's shorthand: None is 1, a number counts for every axis."""
    if value is None:
        value = 1
    return (int(value),) * rank if isinstance(value, int | np.integer) else tuple(map(int, value))


def _padding(padding: Any, rank: int) -> Any:
    """Flax's shorthand: a number pads every side, a number for an axis both of its sides."""
    if isinstance(padding, str):
        return padding.upper()
    if isinstance(padding, int):
        return ((padding, padding),) * rank
    return tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)


# Row numbers are captured as float32, beside gradients; it counts exactly so far.
_MOST_ROWS = 2**24


def _describe_embed(module: Any, x: Any) -> dict[str, Any] | str:
    if x.ndim == 0:
        return "its input has no batch axis"
    if module.num_embeddings == 1:
        return "it has a single row, whatever its input is"
    if module.num_embeddings > _MOST_ROWS:
        return f"it has more than {_MOST_ROWS:,} rows"
    return {"kind": "embed", "contracted": 1}


_FIELDS: dict[type, Callable[[Any, Any], dict[str, Any] | str]] = {
    nn.Dense: lambda module, x: _dense_fields(module, x, (x.ndim - 1,)),
    nn.DenseGeneral: _describe_dense,
    nn.Einsum: _describe_einsum,
    nn.Conv: _describe_conv,
    nn.ConvTranspose: _describe_conv_transpose,
    nn.Embed: _describe_embed,
}


def kernel_of(kind: type, parameters: Mapping[str, Any]) -> Any:
    """The layer's kernel among its parameters; None before `init` has made it."""
    return parameters.get("embedding" if kind is nn.Embed else "kernel")


def input_dtype(kind: type, module: Any, x: Any, parameters: Mapping[str, Any]) -> Any:
    """The dtype in which the layer's input is captured: that of its arithmetic."""
    if kind is nn.Embed:
        return jnp.dtype(jnp.float32)
    return dtypes.canonicalize_dtype(x, *parameters.values(), dtype=module.dtype)


def is_supported(kind: type) -> bool:
    """Whether calls of layers of this type can be captured; subclasses may do anything."""
    return kind in _FIELDS
