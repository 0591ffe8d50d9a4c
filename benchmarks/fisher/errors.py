"""The errors of all approximations of a network's Fisher blocks at one point of its training."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

import tekfac_jax as tekfac
from benchmarks.errors import UsageError
from benchmarks.fisher.blocks import Diagonal, kronecker_floor, make_block, relative_error

METHODS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "KFAC": tekfac.scale_by_kfac,
    "EKFAC": tekfac.scale_by_ekfac,
    "TKFAC": functools.partial(tekfac.scale_by_tkfac, factors="exact"),
    "TKFAC location": functools.partial(tekfac.scale_by_tkfac, factors="location"),
    "TEKFAC": functools.partial(tekfac.scale_by_tekfac, factors="exact"),
    "TEKFAC location": functools.partial(tekfac.scale_by_tekfac, factors="location"),
    "TEKFAC low rank": functools.partial(tekfac.scale_by_tekfac, basis_rank="auto"),
}
FLOOR = "Kronecker floor"
# Theorem 3.1 and the floor: the first error is never larger than the second.
THEOREMS = (
    ("EKFAC", "KFAC"), ("TEKFAC", "TKFAC"), ("TEKFAC location", "TKFAC location"),
    (FLOOR, "KFAC"), (FLOOR, "TKFAC"), (FLOOR, "TKFAC location"),
)  # fmt: skip
# Usual, but no theorem: these cases are counted.
USUAL = (("TEKFAC", "EKFAC"), ("TKFAC", "KFAC"), ("TEKFAC", "TEKFAC location"))
_ROUNDING = 1e-10  # of a squared error
_BYTES = 8 * 2**30  # of single examples' gradients, held at once

Errors = dict[str, float | None]  # by method; None: it does not apply, or F is zero


class Point(NamedTuple):
    """What is measured at one point of the training."""

    step: int
    loss: float  # mean over the examples of the Fisher
    layers: dict[str, Errors]


class TheoremError(Exception):
    """An approximation has a larger error than one that bounds it."""


def measurer(
    model: nn.Module, variables: tuple[Any, Any], inputs: Any, labels: Any
) -> Callable[[int, tuple[Any, Any]], Point]:
    """Compiles a function that finds the errors of all layers.

    Args:
        model: called as (inputs, train=...); returns logits.
        variables: parameters and BatchNorm averages (empty if there are none), for their shapes.
        inputs: the examples that F is the mean over, (N, ...).
        labels: (N,).

    Returns:
        Function of (step, variables).

    Raises:
        UsageError: the gradients of so many examples do not fit into memory.
    """
    inputs, labels = np.asarray(inputs, np.float64), np.asarray(labels)
    _check_memory(len(inputs), variables[0])
    loss_fn = functools.partial(_mean_loss, model)
    with jax.enable_x64(True):
        layers = _blocks(loss_fn, *_in_float64(variables), inputs, labels)

    @jax.jit
    def gradient(params: Any, batch_stats: Any, inputs: Any, labels: Any) -> Any:
        return jax.grad(loss_fn)(params, batch_stats, inputs, labels)

    def gradients(params: Any, batch_stats: Any) -> Any:
        # One at a time: on CPU the kernel gradients of single examples are slow under vmap (10
        # times slower in a ResNet20) and slower still in a compiled loop.
        each = [
            jax.device_get(gradient(params, batch_stats, inputs[n : n + 1], labels[n : n + 1]))
            for n in range(len(inputs))
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def approximate(mean: Any, stats: Any, make: Callable[..., Any]) -> dict[str, Any]:
        # The first update assigns; a decay of 0 makes that explicit.
        tx = make(layers, factor_decay=0.0, rescaling_decay=0.0)
        return tekfac.curvature(tx.update(mean, tx.init(None), stats=stats)[1])

    @jax.jit
    def examine(params: Any, batch_stats: Any) -> tuple[Any, Any]:
        loss, mean, stats = tekfac.value_grad_and_stats(loss_fn, layers)(
            params, batch_stats, inputs, labels
        )
        return loss, {name: approximate(mean, stats, make) for name, make in METHODS.items()}

    def measure(step: int, variables: tuple[Any, Any]) -> Point:
        with jax.enable_x64(True):
            in_float64 = _in_float64(variables)
            loss, found = jax.device_get(examine(*in_float64))
            each = gradients(*in_float64)
        errors = {
            path: layer_errors(
                gradient_matrices(spec, _at(each, path)),
                {name: curvatures[path] for name, curvatures in found.items()},
            )
            for path, spec in layers.items()
        }
        return Point(step, float(loss), errors)

    return measure


def _check_memory(examples: int, params: Any) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    if 8 * examples * parameters > _BYTES:
        raise UsageError(
            f"the gradients of {examples} examples, {parameters:,} numbers each, take more than "
            f"{_BYTES // 2**30} GiB: choose --examples up to {_BYTES // (8 * parameters)}, or a "
            "smaller --width"
        )


def _mean_loss(model: nn.Module, params: Any, batch_stats: Any, inputs: Any, labels: Any) -> Any:
    """Cross-entropy in evaluation mode."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits: Any = model.apply(variables, inputs, train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _blocks(loss_fn: Callable[..., Any], *args: Any) -> tekfac.Layers:
    """The Dense and conv layers with a single Fisher block: neither stacked nor grouped."""
    found = tekfac.find_layers(loss_fn, *args)
    others = {
        path for path, spec in found.items() if spec.kind not in ("dense", "conv") or spec.lead
    }
    return tekfac.find_layers(loss_fn, *args, skip=lambda path: path in others)


def _in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _at(tree: Any, path: str) -> Any:
    """The parameters of a layer."""
    return (
        tree
        if path == "~"
        else functools.reduce(lambda node, key: node[key], path.split("/"), tree)
    )


def gradient_matrices(spec: tekfac.LayerSpec, grads: Mapping[str, Any]) -> Any:
    """G_n, (N, in[+1], out), from the gradients of kernel and bias of N examples."""
    kernel = grads["kernel"]
    matrices = kernel.reshape(len(kernel), -1, spec.out_dim)
    if not spec.use_bias:
        return matrices
    bias = grads["bias"].reshape(len(kernel), 1, spec.out_dim)
    return np.concatenate([matrices, bias], axis=1)


def layer_errors(gradients: Any, approximations: Mapping[str, tekfac.Curvature]) -> Errors:
    """The relative errors of one layer, and the floor.

    Args:
        gradients: G_n, (N, I, O), in float64.
        approximations: by method.

    Returns:
        Errors by method; None if a low rank leaves nothing out, or if F is zero.
    """
    block = make_block(gradients)
    if block.norm == 0:
        return dict.fromkeys((*METHODS, FLOOR))
    errors: Errors = {FLOOR: kronecker_floor(block)}
    for name, found in approximations.items():
        q_phi, q_psi, theta = map(np.asarray, (found.q_phi, found.q_psi, found.theta))
        diagonal = Diagonal(q_phi, q_psi, theta, float(found.theta_rest))
        errors[name] = relative_error(block, diagonal)
    if approximations["TEKFAC low rank"].theta.shape == gradients.shape[1:]:
        errors["TEKFAC low rank"] = None
    return errors


def pairs(
    points: list[Point], better: str, worse: str
) -> Iterator[tuple[Point, str, float, float]]:
    """Every point and layer with the errors of two methods, if both have one."""
    for point in points:
        for path, errors in point.layers.items():
            first, second = errors[better], errors[worse]
            if first is not None and second is not None:
                yield point, path, first, second


def check_theorems(point: Point) -> None:
    """Raises a `TheoremError` unless Theorem 3.1 and the floor hold in every layer."""
    for better, worse in THEOREMS:
        for _, path, first, second in pairs([point], better, worse):
            if not first**2 <= second**2 + _ROUNDING:  # also false if one of them is NaN
                raise TheoremError(
                    f"step {point.step}, layer {path}: the error of {better} is {first!r} and that "
                    f"of {worse} {second!r}; the first cannot be larger, so one of them is wrong"
                )
