"""Flax's layer types: which are supported, and how one call becomes a `LayerSpec`."""

import dataclasses
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Required, TypeAlias, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes

from tekfac_jax._layers.spec import (
    Kind,
    LayerSpec,
    Padding,
    at_least_float32,
    call_positions,
    replace,
)
from tekfac_jax._layers.types import DType, PyTree

Layer: TypeAlias = nn.Module | SimpleNamespace  # of nnx: the attributes it would have in linen


class _Fields(TypedDict, total=False):
    """The fields of a `LayerSpec` that depend on the layer's type."""

    kind: Required[Kind]
    contracted: Required[int]
    groups: int
    attended: bool
    axes: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    padding: Padding


def describe(
    kind: type, method: str, module: Layer, x: jax.Array, y: jax.Array, kernel: jax.Array
) -> LayerSpec | str:
    """The spec of a call (without a path), or why the layer cannot be captured.

    Args:
        kind: the layer's type in `flax.linen`.
        method: ``"__call__"``, or ``"attend"`` of an embedding.
        module: the layer, or an object with its attributes.
        x: its input.
        y: its output.
        kernel: its kernel.
    """
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return f"its kernel is {kernel.dtype}, not a real floating-point array"
    if getattr(module, "promote_dtype", dtypes.promote_dtype) is not dtypes.promote_dtype:
        return "it has a custom promote_dtype"
    fields = _FIELDS[kind](module, x)
    if isinstance(fields, str):
        return fields
    if method == "attend" and x.ndim < 2:
        return "its query has no batch axis"
    if kind is nn.Embed:
        fields["attended"] = method == "attend"
    spec = LayerSpec(
        path="",
        kernel_shape=tuple(kernel.shape),
        use_bias=getattr(module, "use_bias", False),
        dtype=jnp.dtype(kernel.dtype).name,
        **fields,
    )
    return replace(spec, positions=call_positions(spec, y.shape))


def _describe_dense(module: Layer, x: jax.Array) -> _Fields | str:
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    axes = tuple(sorted(axis % x.ndim for axis in axes))
    if module.batch_dims:
        return "it has batch_dims: a separate kernel for each index"
    return _dense_fields(module, x, axes)


def _dense_fields(module: Layer, x: jax.Array, axes: tuple[int, ...]) -> _Fields | str:
    if module.dot_general is not None or module.dot_general_cls is not None:
        return "it has a custom dot_general"
    if 0 in axes:
        return "its input has no batch axis before the contracted axes"
    axes = tuple(axis - x.ndim for axis in axes)
    return {"kind": "dense", "contracted": len(axes), "axes": axes}


def _describe_einsum(module: Layer, x: jax.Array) -> _Fields | str:
    """An einsum that contracts some axes of its input and appends the output axes."""
    if module.einsum_str is None:
        return "its einsum_str is given at the call"

    # An ellipsis stands for axes that are kept; give them letters.
    equation = module.einsum_str.replace(" ", "")
    inputs, kernel, output = equation.replace("->", ",").split(",")
    unused = (c for c in string.ascii_letters if c not in equation)
    further = "".join(itertools.islice(unused, x.ndim - len(inputs.replace("...", ""))))
    inputs, output = (letters.replace("...", further) for letters in (inputs, output))

    # The kernel must be [contracted axes, output axes], and the output [kept axes, output axes].
    contracted = [c for c in kernel if c in inputs and c not in output]
    features = [c for c in kernel if c not in inputs]
    kept = [c for c in inputs if c not in contracted]
    if list(kernel) != contracted + features or list(output) != kept + features:
        return f"its einsum {equation!r} is not a contraction that appends its output axes in order"
    axes = tuple(inputs.index(c) for c in contracted)
    if not axes or 0 in axes:
        return "its input has no batch axis before the contracted axes"
    return {
        "kind": "dense", "contracted": len(axes), "axes": tuple(a - x.ndim for a in axes)
    }  # fmt: skip


def _describe_conv(module: Layer, x: jax.Array) -> _Fields | str:
    window = _tuple(module.kernel_size, 1)
    rank = len(window)
    if module.mask is not None:
        return "its kernel is masked"
    if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
        return "it has a custom conv_general_dilated"
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


def _describe_conv_transpose(module: Layer, x: jax.Array) -> _Fields | str:
    """A convolution whose input is dilated by the strides (`jax.lax.conv_transpose`)."""
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
    """Padding that gives the output the size of the input of the transposed convolution."""
    if padding == "SAME":
        total = extent + stride - 2
        low = extent - 1 if stride > extent - 1 else -(-total // 2)
    else:  # VALID
        total = extent + stride - 2 + max(extent - stride, 0)
        low = extent - 1
    return low, total - low


def _tuple(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Expands Flax's shorthand: None means 1, and a number stands for every axis."""
    if value is None:
        value = 1
    return (int(value),) * rank if isinstance(value, int | np.integer) else tuple(map(int, value))


def _padding(padding: str | int | Sequence[int | Sequence[int]], rank: int) -> Padding:
    """Expands Flax's shorthand: one number for all axes, or one for both sides of an axis."""
    if isinstance(padding, str):
        return padding.upper()
    if isinstance(padding, int):
        return ((padding, padding),) * rank
    return tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)


# Row numbers are captured as float32, like gradients. Up to here it holds integers exactly.
_MOST_ROWS = 2**24


def _describe_embed(module: Layer, x: jax.Array) -> _Fields | str:
    if x.ndim == 0:
        return "its input has no batch axis"
    if module.num_embeddings == 1:
        return "it has a single row, so its output does not depend on its input"
    if module.num_embeddings > _MOST_ROWS:
        return f"it has more than {_MOST_ROWS:,} rows"
    return {"kind": "embed", "contracted": 1}


def _describe_norm(module: Layer, x: jax.Array) -> _Fields | str:
    """A scale and a bias for each feature; the feature axes must be the last ones."""
    axes = getattr(module, "feature_axes", getattr(module, "axis", -1))
    axes = tuple(sorted(axis % x.ndim for axis in _tuple(axes, 1)))
    if 0 in axes:
        return "its input has no batch axis before its feature axes"
    if axes != tuple(range(x.ndim - len(axes), x.ndim)):
        return "its feature axes are not the last axes of its input"
    features = int(np.prod([x.shape[axis] for axis in axes]))
    if features == 1:
        return "it has a single feature"
    return {"kind": "norm", "contracted": 0, "groups": features}


_FIELDS: dict[type, Callable[[Layer, jax.Array], _Fields | str]] = {
    nn.Dense: lambda module, x: _dense_fields(module, x, (x.ndim - 1,)),
    nn.DenseGeneral: _describe_dense,
    nn.Einsum: _describe_einsum,
    nn.Conv: _describe_conv,
    nn.ConvTranspose: _describe_conv_transpose,
    nn.Embed: _describe_embed,
    nn.LayerNorm: _describe_norm,
    nn.RMSNorm: _describe_norm,
    nn.GroupNorm: _describe_norm,
    nn.InstanceNorm: _describe_norm,
    nn.BatchNorm: _describe_norm,
}

_NORMS = frozenset(kind for kind, fields in _FIELDS.items() if fields is _describe_norm)


def kernel_of(kind: type, parameters: Mapping[str, jax.Array]) -> jax.Array | None:
    """The layer's kernel among its parameters; None before `init` has created it."""
    name = "scale" if kind in _NORMS else "embedding" if kind is nn.Embed else "kernel"
    return parameters.get(name)


def input_of(args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """The input among the arguments of a call, under any of the names that layers use."""
    named = (kwargs[name] for name in ("inputs", "x", "query") if name in kwargs)
    return args[0] if args else next(named, None)


def captured_input(
    kind: type, method: str, module: Layer, x: jax.Array, parameters: Mapping[str, jax.Array]
) -> jax.ShapeDtypeStruct:
    """Shape and dtype in which the layer's input is captured: those of its arithmetic."""
    if kind is nn.Embed and method == "__call__":
        dtype = jnp.dtype(jnp.float32)
    else:
        dtype = dtypes.canonicalize_dtype(x, *parameters.values(), dtype=module.dtype)
        # Normalisations compute in at least float32 and round their output.
        dtype = at_least_float32(dtype) if kind in _NORMS else dtype
    return jax.eval_shape(lambda x: x.astype(dtype), x)


def normalised(
    kind: type,
    module: Layer,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    state: Mapping[str, PyTree],
    dtype: DType,
) -> jax.Array:
    """The normalised input: a normalisation's output without its scale and bias.

    Args:
        kind: the layer's type in `flax.linen`.
        module: the layer, or an object with its attributes.
        args: positional arguments of its call.
        kwargs: keyword arguments of its call.
        state: its variables that are not parameters.
        dtype: dtype of the result.
    """
    names = {field.name for field in dataclasses.fields(kind)} - {"name", "parent"}
    options = {name: getattr(module, name) for name in names if hasattr(module, name)}
    without = {name: False for name in ("use_scale", "use_bias") if name in names}
    if len(args) > 1 or kwargs.get("use_running_average") is not None:
        options["use_running_average"] = None  # the call passes it
    same = kind(**{**options, **without, "dtype": dtype}, parent=None)
    return same.apply(state, *args, mutable=True, **kwargs)[0]


def why_not_supported(kind: type, *, norms: bool) -> str:
    """The reason listed for the parameters of a module that is not a covered layer."""
    if kind in _NORMS and norms:
        return f"{kind.__name__} without a scale is not supported"
    if kind in _NORMS:
        return f'{kind.__name__}, left to the fallback (norm="unitwise" covers it)'
    return f"it belongs to {kind.__name__}, which is not a supported layer"


def is_norm(kind: type) -> bool:
    """Whether layers of this type are normalisations with a scale and a bias per feature."""
    return kind in _NORMS


def is_supported(kind: type, method: str, *, norms: bool) -> bool:
    """Whether such calls can be captured. Subclasses are not: they may compute anything.

    Args:
        kind: the layer's type in `flax.linen`.
        method: name of the method that is called.
        norms: whether normalisations count as layers.
    """
    if kind in _NORMS:
        return norms and method == "__call__"
    if method == "attend":
        return kind is nn.Embed
    return method == "__call__" and kind in _FIELDS
