"""What a layer is: its description, and the one normal form that everything behind it uses.

Layer kinds differ only here. A layer is described by a `LayerSpec`, its kernel and bias
become one (in[+1], out) matrix, and what was captured becomes

* `a` [N, T, in[+1]]: the input at each of T positions, with a 1 appended where there is a bias,
* `u` [N, T, out]: the gradient of the loss with respect to the output there,

so that the gradient of example n is the matrix ``a[n].T @ u[n]``. Layers that stand side by side
in one parameter (`nn.scan`, `nn.vmap`, the groups of a convolution) have leading axes, `lead`, in
front of everything: each has curvature of its own, and all are computed together.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Kind = Literal["dense", "conv", "embed", "norm"]
Padding = str | tuple[tuple[int, int], ...]


class Capture(NamedTuple):
    """What one call of a layer leaves behind.

    Attributes:
        a: the layer's input, as the layer received it (batch axis first); of a normalisation what
            it multiplies by its scale.
        u: gradient of the loss with respect to the layer's output, in the output's shape.
    """

    a: jax.Array
    u: jax.Array


class Statistics(NamedTuple):
    """Curvature statistics of one batch, as captured.

    Attributes:
        layers: for each layer path one `Capture` per call of the layer.
        scale: what `u` is multiplied by to become the gradient of the summed loss. Shape ().
        examples: number of examples that sums are divided by, shape (); None: as many as were
            captured.
        parts: of how many statistics this is the sum, shape (). A sum of captures means nothing,
            and shows here; None: taken for 1.
    """

    layers: dict[str, tuple[Capture, ...]]
    scale: jax.Array
    examples: jax.Array | None = None
    parts: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer whose curvature is captured. Holds no batch size and no array.

    Attributes:
        path: where the dict with the kernel stands in argument 0, keys joined by ``/``.
        kind: ``"dense"`` (`nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`), ``"conv"`` (`nn.Conv`,
            `nn.ConvTranspose`), ``"embed"`` (`nn.Embed`) or ``"norm"`` (`nn.LayerNorm` and its
            like: as many groups as features, of a scale and a bias each).
        kernel_shape: shape of the kernel (table, scale) as the layer sees it.
        contracted: how many leading axes of the kernel are input axes.
        use_bias: whether a bias stands beside the kernel.
        dtype: name of the kernel's dtype.
        stack: how many layers are stacked in the kernel, for each axis that `nn.scan` or `nn.vmap`
            runs over.
        kernel_stack: the kernel's axes, in Flax's parameter, that these are.
        bias_stack: the same for the bias.
        groups: conv, norm: groups of features.
        attended: embed: whether `attend` is called too, or alone: a tied output head.
        axes: dense: the input axes that are contracted, counted from the end (negative).
        strides: conv: window strides.
        dilation: conv: kernel dilation.
        input_dilation: conv: how far apart the input's positions are spread, zeros between them.
        padding: conv: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"``
            or (low, high) for each spatial axis.
        positions: T in the example that the layer was found with, over all its calls. Only for
            the table and for planning: another T at update is fine, so it does not count in
            comparisons.
    """

    path: str
    kind: Kind
    kernel_shape: tuple[int, ...]
    contracted: int
    use_bias: bool
    dtype: str
    stack: tuple[int, ...] = ()
    kernel_stack: tuple[int, ...] = ()
    bias_stack: tuple[int, ...] = ()
    groups: int = 1
    attended: bool = False
    axes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    input_dilation: tuple[int, ...] = ()
    padding: Padding = ()
    positions: int = dataclasses.field(default=1, compare=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes in front of every factor: stacked layers, then groups."""
        return (*self.stack, self.groups) if self.groups > 1 else self.stack

    @property
    def in_dim(self) -> int:
        """Rows of the gradient matrix: inputs of the kernel, plus one for a bias."""
        return math.prod(self.kernel_shape[: self.contracted]) + self.use_bias

    @property
    def out_dim(self) -> int:
        """Columns of the gradient matrix: outputs of the kernel (of a group of it)."""
        return math.prod(self.bias_shape) // self.groups

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of the bias as the layer sees it."""
        return self.kernel_shape[self.contracted :]

    @property
    def kernel_name(self) -> str:
        """What Flax calls the kernel."""
        return {"embed": "embedding", "norm": "scale"}.get(self.kind, "kernel")

    @property
    def has_input_basis(self) -> bool:
        """Whether Φ is a matrix with eigenvectors; of an embedding it is a vector, and Q_Φ is I."""
        return self.kind != "embed"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of kernel and bias as Flax keeps them."""
        shapes = {self.kernel_name: _stacked(self.kernel_shape, self.stack, self.kernel_stack)}
        if self.use_bias:
            shapes["bias"] = _stacked(self.bias_shape, self.stack, self.bias_stack)
        return shapes

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state: Φ, Ψ, Q_Φ, Q_Ψ and Θ in at least float32."""
        itemsize = at_least_float32(self.dtype).itemsize
        phi = 2 * self.in_dim**2 if self.has_input_basis else self.in_dim
        numbers = phi + 2 * self.out_dim**2 + self.in_dim * self.out_dim
        return itemsize * math.prod(self.lead) * numbers


def _stacked(
    shape: tuple[int, ...], stack: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[int, ...]:
    full = list(shape)
    for axis, size in sorted(zip(axes, stack, strict=True)):
        full.insert(axis, size)
    return tuple(full)


@dataclasses.dataclass(frozen=True)
class Layers(Mapping[str, LayerSpec]):
    """Frozen, hashable mapping from layer path to `LayerSpec`; prints as a table.

    Attributes:
        specs: the layers that are covered, in the order in which they are called.
        uncovered: (parameter path, reason) for each parameter that is not.
        batch_size: what `find_layers` took for the number of examples, the leading axis of the
            layers' inputs; None where it was not asked.
    """

    specs: tuple[LayerSpec, ...]
    uncovered: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)
    batch_size: int | None = dataclasses.field(default=None, compare=False)

    def __getitem__(self, path: str) -> LayerSpec:
        for spec in self.specs:
            if spec.path == path:
                return spec
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return (spec.path for spec in self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        head = ("layer", "kind", "in", "out", "positions", "state bytes")
        rows = [
            (s.path, s.kind, _times(s.lead, s.in_dim), str(s.out_dim), str(s.positions),
             f"{s.state_bytes:,}")
            for s in self.specs
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [head, *rows]
        ]
        total = sum(s.state_bytes for s in self.specs)
        batch = "" if self.batch_size is None else f", seen with {self.batch_size:,} examples"
        lines.append(f"{len(self)} layers, {total:,} bytes of state{batch}")
        if self.uncovered:
            lines += ["", "not covered:"]
            lines += [f"  {path}: {reason}" for path, reason in self.uncovered]
        return "\n".join(line.rstrip() for line in lines)


def check_layers(layers: Any) -> None:
    """Raises unless it is what `find_layers` returns."""
    if not isinstance(layers, Layers):
        raise ValueError(f"layers must come from find_layers, got {type(layers).__name__}")


def _times(lead: tuple[int, ...], dim: int) -> str:
    return "×".join(map(str, (*lead, dim)))


def at_least_float32(dtype: Any) -> Any:
    """The dtype of curvature for parameters of `dtype`: half precision is not enough."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def zeros_like(shape: Any) -> jax.Array:
    """Zeros that also vary over the axes of `jax.shard_map` that `shape` varies over."""
    return lax.full_like(shape, 0)


def replace(spec: LayerSpec, **changes: Any) -> LayerSpec:
    """A copy of `spec` with some fields changed."""
    return dataclasses.replace(spec, **changes)


def join_path(keys: tuple[Any, ...]) -> str:
    """Joins a JAX key path with ``/``; the empty path (a bare layer as root) is ``~``."""

    def name(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    return "/".join(map(name, unboxed(keys))) or "~"


def unboxed(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without the box around its end: `nn.Partitioned`, or a variable of nnx."""
    return keys[:-1] if keys and getattr(keys[-1], "name", None) == "value" else keys


def parameter_path(layer_path: str, name: str) -> str:
    """Path of the kernel or bias of a layer."""
    return name if layer_path == "~" else f"{layer_path}/{name}"


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


def keeps_all(spec: LayerSpec, theta_shape: tuple[int, ...]) -> bool:
    """Whether a Θ of that shape belongs to a basis with all columns."""
    return theta_shape[-2:] == (spec.in_dim, spec.out_dim)


def call_positions(spec: LayerSpec, output_shape: tuple[int, ...]) -> int:
    """T of one call, from the shape of the layer's output (without stacked axes)."""
    features = len(spec.bias_shape)
    return math.prod(output_shape[1 : len(output_shape) - features])


def normal_form(spec: LayerSpec, capture: Capture, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """One call as `a` [*lead, N, T, in[+1]] and `u` [*lead, N, T, out], in `dtype`.

    Of an embedding `a` is [*lead, N, T, 1], the row numbers. Where its table is attended too `a`
    is [*lead, N, T, rows]: a 1 in the row that is read, and from `attend`, whose gradient is
    Σ_t u_nt a_ntᵀ, what its output received; `u` is the other side. Of a normalisation both are
    [*stack, N, T, features].
    """

    def one(a: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = u.shape[0]
        if spec.kind == "embed":
            return _rows_and_vectors(spec, a, u, dtype)
        if spec.kind == "norm":
            shape = (n, -1, spec.groups)
            return a.reshape(shape).astype(dtype), u.reshape(shape).astype(dtype)
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
    spec: LayerSpec, a: jax.Array, u: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    n, rows = u.shape[0], spec.in_dim
    if is_attend(a, u):
        return u.reshape(n, -1, rows).astype(dtype), a.reshape(n, -1, spec.out_dim).astype(dtype)
    if spec.attended:
        a = jax.nn.one_hot(row_numbers(a, rows), rows)
        return a.reshape(n, -1, rows).astype(dtype), u.reshape(n, -1, spec.out_dim).astype(dtype)
    return a.reshape(n, -1, 1).astype(dtype), u.reshape(n, -1, spec.out_dim).astype(dtype)


def is_attend(a: Any, u: Any) -> bool:
    """Whether an embedding's call was `attend`: its input is vectors, not row numbers."""
    return a.ndim == u.ndim


def row_numbers(a: jax.Array, rows: int) -> jax.Array:
    """An embedding's input as integers; negative ones count from the end, as in `jnp.take`."""
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

    Slices of the padded input rather than `lax.conv_general_dilated_patches`: copies keep every
    bit, and convolution primitives are slow inside `lax.cond` on CPU.
    """
    window = spec.kernel_shape[:-2]
    rank = len(window)
    batch = a.shape[: a.ndim - rank - 1]
    a = a.reshape(-1, *a.shape[a.ndim - rank - 1 :])
    a = _pad(spec, a)
    # One axis after the other: 3 + 3 slices for a 3×3 window instead of 9.
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
        spatial: Any = [(extent[0] - 1, 0)]
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
