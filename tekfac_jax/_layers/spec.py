"""What a layer is: its description, and the one normal form that everything downstream uses.

A `LayerSpec` describes a layer. Its kernel and bias become one (in[+1], out) matrix, and what was
captured becomes

* `a` [N, T, in[+1]]: the input at each of T positions, with a 1 appended if there is a bias,
* `u` [N, T, out]: the gradient of the loss with respect to the output at each position,

so the gradient of example n is the matrix ``a[n].T @ u[n]``. Layers stacked in one parameter
(`nn.scan`, `nn.vmap`, the groups of a convolution) have leading axes, `lead`, in front of
everything: each has its own curvature, and all are computed together.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tekfac_jax._layers.types import DType, Shaped

T = TypeVar("T")

Kind = Literal["dense", "conv", "embed", "norm"]
Padding = str | tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer whose curvature is captured. Contains no batch size and no arrays.

    Attributes:
        path: where the dict with the kernel is in argument 0, keys joined by ``/``.
        kind: ``"dense"`` (`nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`), ``"conv"`` (`nn.Conv`,
            `nn.ConvTranspose`), ``"embed"`` (`nn.Embed`) or ``"norm"`` (`nn.LayerNorm` and
            similar: one group per feature, each with a scale and a bias).
        kernel_shape: shape of the kernel (table, scale) as the layer sees it.
        contracted: how many leading axes of the kernel are input axes.
        use_bias: whether the layer has a bias.
        dtype: name of the kernel's dtype.
        stack: how many layers are stacked in the kernel, for each axis that `nn.scan` or `nn.vmap`
            adds.
        kernel_stack: where these axes are in Flax's kernel.
        bias_stack: where they are in Flax's bias.
        groups: conv, norm: groups of features.
        attended: embed: whether `attend` is called, with or without lookups: a tied output head.
        axes: dense: the input axes that are contracted, counted from the end (negative).
        strides: conv: window strides.
        dilation: conv: kernel dilation.
        input_dilation: conv: spacing of the input's positions, with zeros in between.
        padding: conv: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"``
            or (low, high) for each spatial axis.
        positions: T of the inputs with which the layer was found, over all its calls. Only for
            the table and for planning: T may differ at an update, so comparisons ignore it.
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
        """Rows of the gradient matrix: the kernel's inputs, plus one for a bias."""
        return math.prod(self.kernel_shape[: self.contracted]) + self.use_bias

    @property
    def out_dim(self) -> int:
        """Columns of the gradient matrix: the kernel's outputs (those of one group)."""
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
        """Whether Φ is a matrix with eigenvectors; for an embedding it is a vector, and Q_Φ = I."""
        return self.kind != "embed"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of kernel and bias as Flax stores them."""
        shapes = {self.kernel_name: _with_stack(self.kernel_shape, self.stack, self.kernel_stack)}
        if self.use_bias:
            shapes["bias"] = _with_stack(self.bias_shape, self.stack, self.bias_stack)
        return shapes

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state: Φ, Ψ, Q_Φ, Q_Ψ and Θ in at least float32."""
        itemsize = at_least_float32(self.dtype).itemsize
        phi = 2 * self.in_dim**2 if self.has_input_basis else self.in_dim
        numbers = phi + 2 * self.out_dim**2 + self.in_dim * self.out_dim
        return itemsize * math.prod(self.lead) * numbers


def _with_stack(
    shape: tuple[int, ...], stack: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a parameter with its stack axes inserted at `axes`."""
    full = list(shape)
    for axis, size in sorted(zip(axes, stack, strict=True)):
        full.insert(axis, size)
    return tuple(full)


@dataclasses.dataclass(frozen=True)
class Layers(Mapping[str, LayerSpec]):
    """Frozen, hashable mapping from layer path to `LayerSpec`; prints as a table.

    Attributes:
        specs: the covered layers, in the order of their calls.
        uncovered: (parameter path, reason) for each parameter that is not covered.
        batch_size: the number of examples that `find_layers` inferred from the leading axis of
            the layers' inputs; None if it was not inferred.
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


def check_layers(layers: object) -> None:
    """Raises unless `layers` comes from `find_layers`."""
    if not isinstance(layers, Layers):
        raise ValueError(f"layers must come from find_layers, got {type(layers).__name__}")


def _times(lead: tuple[int, ...], dim: int) -> str:
    return "×".join(map(str, (*lead, dim)))


def at_least_float32(dtype: DType) -> np.dtype[np.generic]:
    """The dtype of curvature for parameters of `dtype`: half precision does not suffice."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def zeros_like(like: Shaped) -> jax.Array:
    """Zeros that vary over the same axes of `jax.shard_map` as `like`, which may be a shape."""
    return lax.full_like(like, 0)


def unchanged(x: T) -> T:
    """The branch of a `lax.cond` that does nothing."""
    return x


def replace(spec: LayerSpec, **changes: object) -> LayerSpec:
    """A copy of `spec` with some fields changed."""
    return dataclasses.replace(spec, **changes)  # pyright: ignore[reportArgumentType]


def keeps_all(spec: LayerSpec, theta_shape: tuple[int, ...]) -> bool:
    """Whether a Θ of that shape belongs to a basis that keeps all columns."""
    return theta_shape[-2:] == (spec.in_dim, spec.out_dim)


def call_positions(spec: LayerSpec, output_shape: tuple[int, ...]) -> int:
    """T of one call, from the shape of the layer's output (without stacked axes)."""
    features = len(spec.bias_shape)
    return math.prod(output_shape[1 : len(output_shape) - features])
