"""What a layer is: its description, and the one normal form that everything behind it uses.

Layer kinds differ only here. A layer is described by a `LayerSpec`, its kernel and bias
become one (in[+1], out) matrix, and what was captured becomes

* `a` [N, T, in[+1]]: the input at each of T positions, with a 1 appended where there is a bias,
* `u` [N, T, out]: the gradient of the loss with respect to the output there,

so that the gradient of example n is the matrix ``a[n].T @ u[n]``.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Kind = Literal["dense", "conv"]
Padding = str | tuple[tuple[int, int], ...]


class Capture(NamedTuple):
    """What one call of a layer leaves behind.

    Attributes:
        a: the layer's input, as the layer received it (batch axis first).
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
    """

    layers: dict[str, tuple[Capture, ...]]
    scale: jax.Array
    examples: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer whose curvature is captured. Holds no batch size and no array.

    Attributes:
        path: where the dict with the kernel stands in argument 0, keys joined by ``/``.
        kind: ``"dense"`` (`nn.Dense`, `nn.DenseGeneral`) or ``"conv"`` (`nn.Conv`).
        kernel_shape: shape of the kernel as Flax keeps it.
        contracted: how many leading axes of the kernel are input axes.
        use_bias: whether a bias stands beside the kernel.
        dtype: name of the kernel's dtype.
        axes: dense: the input axes that are contracted, counted from the end (negative).
        strides: conv: window strides.
        dilation: conv: kernel dilation.
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
    axes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: Padding = ()
    positions: int = dataclasses.field(default=1, compare=False)

    @property
    def in_dim(self) -> int:
        """Rows of the gradient matrix: inputs of the kernel, plus one for a bias."""
        return math.prod(self.kernel_shape[: self.contracted]) + self.use_bias

    @property
    def out_dim(self) -> int:
        """Columns of the gradient matrix: outputs of the kernel."""
        return math.prod(self.kernel_shape[self.contracted :])

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of the bias as Flax keeps it."""
        return self.kernel_shape[self.contracted :]

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state: Φ, Ψ, Q_Φ, Q_Ψ and Θ in at least float32."""
        itemsize = at_least_float32(self.dtype).itemsize
        square = self.in_dim**2 + self.out_dim**2
        return itemsize * (2 * square + self.in_dim * self.out_dim)


@dataclasses.dataclass(frozen=True)
class Layers(Mapping[str, LayerSpec]):
    """Frozen, hashable mapping from layer path to `LayerSpec`; prints as a table.

    Attributes:
        specs: the layers that are covered, in the order in which they are called.
        uncovered: (parameter path, reason) for each parameter that is not.
    """

    specs: tuple[LayerSpec, ...]
    uncovered: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)

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
            (s.path, s.kind, str(s.in_dim), str(s.out_dim), str(s.positions), f"{s.state_bytes:,}")
            for s in self.specs
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [head, *rows]
        ]
        total = sum(s.state_bytes for s in self.specs)
        lines.append(f"{len(self)} layers, {total:,} bytes of state")
        if self.uncovered:
            lines += ["", "not covered:"]
            lines += [f"  {path}: {reason}" for path, reason in self.uncovered]
        return "\n".join(line.rstrip() for line in lines)


def at_least_float32(dtype: Any) -> Any:
    """The dtype of curvature for parameters of `dtype`: half precision is not enough."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def zeros_like(shape: jax.ShapeDtypeStruct) -> jax.Array:
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

    return "/".join(map(name, keys)) or "~"


def parameter_path(layer_path: str, name: str) -> str:
    """Path of the kernel or bias of a layer."""
    return name if layer_path == "~" else f"{layer_path}/{name}"


def to_matrix(spec: LayerSpec, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Kernel and bias as one (in[+1], out) matrix, the bias as its last row."""
    matrix = kernel.reshape(-1, spec.out_dim)
    if bias is None:
        return matrix
    return jnp.concatenate([matrix, bias.reshape(1, spec.out_dim).astype(matrix.dtype)])


def from_matrix(spec: LayerSpec, matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Inverse of `to_matrix`."""
    if not spec.use_bias:
        return matrix.reshape(spec.kernel_shape), None
    return matrix[:-1].reshape(spec.kernel_shape), matrix[-1].reshape(spec.bias_shape)


def call_positions(spec: LayerSpec, output_shape: tuple[int, ...]) -> int:
    """T of one call, from the shape of the layer's output."""
    features = len(spec.kernel_shape) - spec.contracted
    return math.prod(output_shape[1 : len(output_shape) - features])


def normal_form(spec: LayerSpec, capture: Capture, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """One call as `a` [N, T, in[+1]] and `u` [N, T, out], in `dtype`."""
    a, u = capture
    n = u.shape[0]
    rows = _patches(spec, a) if spec.kind == "conv" else _contracted_last(spec, a)
    a = rows.reshape(n, -1, math.prod(spec.kernel_shape[: spec.contracted])).astype(dtype)
    if spec.use_bias:
        a = jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), dtype)], axis=-1)
    return a, u.reshape(n, -1, spec.out_dim).astype(dtype)


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
    sizes = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, d, s in zip(a.shape[1:-1], window, spec.dilation, spec.strides, strict=True)
    ]
    views = []
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, spec.dilation, strict=True)]
        stop = [
            b + (size - 1) * s + 1 for b, size, s in zip(start, sizes, spec.strides, strict=True)
        ]
        views.append(
            lax.slice(
                a,
                (0, *start, 0),
                (a.shape[0], *stop, a.shape[-1]),
                (1, *spec.strides, 1),
            )
        )
    patches = jnp.concatenate(views, axis=-1)
    return patches.reshape(*batch, *patches.shape[1:])


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
    config = [(0, 0, 0), *((int(low), int(high), 0) for low, high in spatial), (0, 0, 0)]
    return lax.pad(a, np.zeros((), a.dtype), config)
