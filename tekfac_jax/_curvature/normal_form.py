"""The normal form: each call of a layer as inputs [N, T, in[+1]] and output gradients [N, T, out].

Layer kinds differ here and in the contractions; everything else is one formula.
"""

# pyright: reportUnknownMemberType=false
# JAX leaves parameters of `jnp.pad` untyped.

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tekfac_jax._layers.spec import LayerSpec
from tekfac_jax._layers.statistics import Capture
from tekfac_jax._layers.types import DType, Shaped


def normal_form(spec: LayerSpec, capture: Capture, dtype: DType) -> tuple[jax.Array, jax.Array]:
    """One call as `a` [*lead, N, T, in[+1]] and `u` [*lead, N, T, out], in `dtype`.

    For an embedding `a` holds the row numbers, [*lead, N, T, 1]. If its table is also attended, `a`
    is [*lead, N, T, rows]: one-hot for a lookup. For a call of `attend`, whose gradient is
    Σ_t u_nt a_ntᵀ, the two sides are exchanged: `a` is the gradient of the scores. For a
    normalisation both are [*stack, N, T, features].
    """

    def one(a: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = u.shape[0]
        if spec.kind == "embed":
            return _rows_and_vectors(spec, a, u, dtype)
        if spec.kind == "norm":
            shape = (n, -1, spec.groups)
            return a.reshape(shape).astype(dtype), u.reshape(shape).astype(dtype)
        # What the kernel multiplies at each position, then groups as a leading axis, then the bias.
        rows = _patches(spec, a) if spec.kind == "conv" else _contracted_last(spec, a)
        a = rows.reshape(n, -1, math.prod(spec.kernel_shape[: spec.contracted]) * spec.groups)
        a, u = a.astype(dtype), u.reshape(n, -1, spec.groups, spec.out_dim).astype(dtype)
        a = _by_group(spec, a)
        if spec.use_bias:
            a = jnp.concatenate([a, lax.full_like(a[..., :1], 1)], axis=-1)
        return a, jnp.moveaxis(u, 2, 0) if spec.groups > 1 else u[:, :, 0]

    for _ in spec.stack:
        one = jax.vmap(one)
    return one(*capture)


def _rows_and_vectors(
    spec: LayerSpec, a: jax.Array, u: jax.Array, dtype: DType
) -> tuple[jax.Array, jax.Array]:
    """`a` and `u` of one call of an embedding."""
    n, rows = u.shape[0], spec.in_dim
    if is_attend(a, u):
        return u.reshape(n, -1, rows).astype(dtype), a.reshape(n, -1, spec.out_dim).astype(dtype)
    if spec.attended:
        a = jax.nn.one_hot(row_numbers(a, rows), rows)
        return a.reshape(n, -1, rows).astype(dtype), u.reshape(n, -1, spec.out_dim).astype(dtype)
    return a.reshape(n, -1, 1).astype(dtype), u.reshape(n, -1, spec.out_dim).astype(dtype)


def is_attend(a: Shaped, u: Shaped) -> bool:
    """Whether an embedding's call was `attend`, whose input is vectors instead of row numbers."""
    return a.ndim == u.ndim


def row_numbers(a: jax.Array, rows: int) -> jax.Array:
    """An embedding's input as integers; negative numbers count from the end, as in `jnp.take`."""
    ids = a.astype(jnp.int32)
    return jnp.where(ids < 0, ids + rows, ids)


def _by_group(spec: LayerSpec, a: jax.Array) -> jax.Array:
    """[N, T, (*window, groups, c)] -> [groups, N, T, (*window, c)]."""
    if spec.groups == 1:
        return a
    inputs = spec.kernel_shape[spec.contracted - 1]
    a = a.reshape(*a.shape[:2], -1, spec.groups, inputs)
    return jnp.moveaxis(a, 3, 0).reshape(spec.groups, *a.shape[:2], -1)


def _contracted_last(spec: LayerSpec, a: jax.Array) -> jax.Array:
    """Moves the contracted axes behind the others, in the kernel's order."""
    return jnp.moveaxis(a, spec.axes, range(-len(spec.axes), 0))


def _patches(spec: LayerSpec, a: jax.Array) -> jax.Array:
    """The kernel's view of each output position, features in the kernel's (*window, c_in) order.

    Built from slices of the padded input, not with `lax.conv_general_dilated_patches`: copies keep
    every bit, and convolution primitives are slow inside `lax.cond` on CPU.
    """
    window = spec.kernel_shape[:-2]
    rank = len(window)
    batch = a.shape[: a.ndim - rank - 1]
    a = a.reshape(-1, *a.shape[a.ndim - rank - 1 :])
    a = _pad(spec, a)
    # One axis after another: a 3×3 window takes 3 + 3 slices instead of 9.
    for axis in reversed(range(1, rank + 1)):
        k, d, s = window[axis - 1], spec.dilation[axis - 1], spec.strides[axis - 1]
        size = (a.shape[axis] - (k - 1) * d - 1) // s + 1
        views = [
            lax.slice_in_dim(a, start * d, start * d + (size - 1) * s + 1, s, axis)
            for start in range(k)
        ]
        a = jnp.concatenate(views, axis=-1)
    return a.reshape(*batch, *a.shape[1:])


_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def _pad(spec: LayerSpec, a: jax.Array) -> jax.Array:
    """Pads the spatial axes of `a` [batch, *spatial, c] as `nn.Conv` does."""
    extent = [(k - 1) * d + 1 for k, d in zip(spec.kernel_shape[:-2], spec.dilation, strict=True)]
    if spec.padding in _PAD_MODES:
        pads = [(0, 0), *(((e - 1) // 2, e // 2) for e in extent), (0, 0)]
        return jnp.pad(a, pads, mode=_PAD_MODES[spec.padding])
    if spec.padding == "CAUSAL":
        spatial: Sequence[tuple[int, int]] = [(extent[0] - 1, 0)]
    elif isinstance(spec.padding, str):
        spatial = lax.padtype_to_pads(a.shape[1:-1], extent, spec.strides, spec.padding)
    else:
        spatial = spec.padding
    # Negative padding crops, as in lax.conv_general_dilated.
    inner = [
        (int(low), int(high), d - 1)
        for (low, high), d in zip(spatial, spec.input_dilation, strict=True)
    ]
    return lax.pad(a, np.zeros((), a.dtype), [(0, 0, 0), *inner, (0, 0, 0)])
