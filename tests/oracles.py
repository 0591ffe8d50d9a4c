"""Brute force in float64: per-example gradients, dense Fisher blocks, dense solves.

Nothing here uses the library's contractions. A case is a small network, a batch and a loss; the
oracle differentiates the loss of one example at a time with `jax.vmap(jax.grad)`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac


class Case(NamedTuple):
    """A network, a batch, and the layer under test."""

    model: nn.Module
    params: Any
    x: jax.Array
    y: jax.Array
    path: str

    def outputs(self, params, x):
        return self.model.apply({"params": params}, x)

    def losses(self, params, x, y):
        """The loss of each example: cross-entropy over the last axis, summed over predictions."""
        losses = optax.softmax_cross_entropy_with_integer_labels(self.outputs(params, x), y)
        return losses.reshape(x.shape[0], -1).sum(axis=1)

    def mean_loss(self, params, x, y):
        return self.losses(params, x, y).mean()

    def layers(self):
        """Only the layer under test; the others would cost compile time."""
        args = self.params, self.x, self.y
        return tekfac.find_layers(self.mean_loss, *args, skip=lambda path: path != self.path)

    def grads_and_stats(self, layers=None, x=None, y=None):
        layers = self.layers() if layers is None else layers
        x, y = (self.x, self.y) if x is None else (x, y)
        fn = jax.jit(tekfac.value_grad_and_stats(self.mean_loss, layers))
        _, grads, stats = fn(self.params, x, y)
        return grads, stats


class ConvNet(nn.Module):
    """Stride 2, dilation 2, a non-square kernel, and a dense head."""

    bias: bool

    @nn.compact
    def __call__(self, x):
        def conv(features, window, **options):
            return nn.Conv(features, window, use_bias=self.bias, param_dtype=x.dtype, **options)

        x = jnp.tanh(conv(3, (3, 2), strides=(2, 1), name="strided")(x))
        x = jnp.tanh(conv(3, (2, 3), kernel_dilation=(2, 1), padding="VALID", name="dilated")(x))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(4, use_bias=self.bias, param_dtype=x.dtype, name="head")(x)


class DenseNet(nn.Module):
    """Two dense layers; on (N, T, F) inputs they have T positions."""

    bias: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, use_bias=self.bias, param_dtype=x.dtype, name="hidden")(x)
        return nn.Dense(3, use_bias=self.bias, param_dtype=x.dtype, name="head")(jnp.tanh(x))


# name -> (model, input shape, number of classes, label shape, layer)
_CASES = {
    "dense": (DenseNet(bias=True), (11, 6), 3, (11,), "hidden"),
    "dense no bias": (DenseNet(bias=False), (11, 6), 3, (11,), "hidden"),
    "dense positions": (DenseNet(bias=True), (7, 4, 6), 3, (7, 4), "hidden"),
    "conv strided": (ConvNet(bias=True), (13, 7, 5, 2), 4, (13,), "strided"),
    "conv strided no bias": (ConvNet(bias=False), (13, 7, 5, 2), 4, (13,), "strided"),
    "conv dilated": (ConvNet(bias=True), (13, 7, 5, 2), 4, (13,), "dilated"),
    "conv dilated no bias": (ConvNet(bias=False), (13, 7, 5, 2), 4, (13,), "dilated"),
}
CASE_NAMES = tuple(_CASES)
SINGLE_POSITION = ("dense", "dense no bias")
every_case = pytest.mark.parametrize("name", CASE_NAMES)


@functools.cache
def make_case(name: str) -> Case:
    """The case of that name, with its data in float64."""
    model, shape, classes, label_shape, path = _CASES[name]
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], shape, jnp.float64)
    y = jax.random.randint(keys[1], label_shape, 0, classes)
    return Case(model, model.init(keys[2], x)["params"], x, y, path)


def matrix(layer: Any) -> jax.Array:
    """Kernel and bias of one layer, the bias as its last row: an (in[+1], out) matrix."""
    kernel = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
    return jnp.vstack([kernel, layer["bias"][None]]) if "bias" in layer else kernel


@functools.cache
def per_example_matrices(name: str) -> np.ndarray:
    """G_n of the case's layer, [N, in[+1], out]."""
    case = make_case(name)

    def loss(params, x, y):
        return case.losses(params, x[None], y[None])[0]

    grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(case.params, case.x, case.y)
    return np.asarray(jax.vmap(matrix)(grads[case.path]))


def fisher(g: np.ndarray) -> np.ndarray:
    """F = E[vec(G) vec(G)ᵀ], row-major."""
    flat = g.reshape(len(g), -1)
    return flat.T @ flat / len(g)


def partial_traces(f: np.ndarray, i: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    """The partial traces of F over the output side, (i, i), and over the input side, (o, o)."""
    blocks = f.reshape(i, o, i, o)
    return np.einsum("aobo->ab", blocks), np.einsum("aiaj->ij", blocks)


def random_orthogonal(seed: int, d: int) -> np.ndarray:
    """An orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def operator(curvature: tekfac.Curvature) -> np.ndarray:
    """(Q_Φ⊗Q_Ψ) diag(Θ) (Q_Φ⊗Q_Ψ)ᵀ as a dense matrix."""
    q = np.kron(curvature.q_phi, curvature.q_psi)
    return (q * np.asarray(curvature.theta).ravel()) @ q.T


SCALE_BY: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "tekfac": tekfac.scale_by_tekfac,
    "tkfac": tekfac.scale_by_tkfac,
    "ekfac": tekfac.scale_by_ekfac,
    "kfac": tekfac.scale_by_kfac,
}
every_sibling = pytest.mark.parametrize("sibling", SCALE_BY)

# A Monte-Carlo mean agrees if it is within this many standard errors.
MONTE_CARLO_SIGMAS = 5.0


def one_update(case: Case, name: str = "tekfac", grads: Any = None, stats: Any = None, **options):
    """One update of `scale_by_<name>`: the layer's update as a matrix, and the state."""
    layers = case.layers()
    if stats is None:
        grads, stats = case.grads_and_stats(layers)
    tx = SCALE_BY[name](layers, **options)
    update = jax.jit(lambda grads, stats: tx.update(grads, tx.init(case.params), stats=stats))
    updates, state = update(grads, stats)
    return np.asarray(matrix(updates[case.path])), state


@functools.cache
def curvature_of(name: str, sibling: str = "tekfac", **options) -> tekfac.Curvature:
    """The curvature of a case's layer after one update."""
    case = make_case(name)
    found = tekfac.curvature(one_update(case, sibling, **options)[1])[case.path]
    return jax.tree.map(np.asarray, found)


def dense_statistics(a, u):
    """A single dense layer without bias, and statistics made by hand (T = 1)."""
    model = nn.Dense(u.shape[1], use_bias=False, param_dtype=jnp.float64)
    x = jnp.asarray(a)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return jnp.sum(model.apply({"params": params}, x))

    layers = tekfac.find_layers(loss, params, x)
    stats = tekfac.Statistics({"~": (tekfac.Capture(x, jnp.asarray(u)),)}, jnp.float64(1))
    return params, layers, stats


def relative(actual: Any, expected: Any) -> float:
    """Relative error in the Frobenius norm."""
    expected = np.asarray(expected)
    # Only zero is close to zero, which θ⊥ of a full basis is.
    scale = max(float(np.linalg.norm(expected)), 1e-300)
    return float(np.linalg.norm(np.asarray(actual) - expected)) / scale
