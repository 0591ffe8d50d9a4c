"""Curvature statistics with labels from the model instead of the batch."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, Protocol, TypeGuard, cast

import jax
import jax.numpy as jnp

from tekfac_jax._arguments import check_choice, check_flag, check_function, check_key, check_number
from tekfac_jax._capture.modes import MakeCollector, Mode, statistics_function
from tekfac_jax._capture.plan import batch_plan
from tekfac_jax._layers.spec import Layers, LayerSpec, check_layers
from tekfac_jax._layers.statistics import FactorKind, StatisticsOfBatch
from tekfac_jax._layers.types import Params, PyTree

Estimator = Literal["sampled", "exact"]


class Likelihood(Protocol):
    """What the outputs of a network mean. `fisher_root` is needed for ``"exact"`` only."""

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """−log p(targets | outputs), in any shape: the entries are summed."""
        ...

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Targets drawn from the predictive distribution."""
        ...


class _WithFisherRoot(Likelihood, Protocol):
    def fisher_root(self, outputs: jax.Array) -> jax.Array:
        """Columns whose outer products sum to the Fisher matrix of an example's outputs."""
        ...


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Softmax over the last axis. Outputs: logits [N, ..., K]; targets: integers [N, ...]."""

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """−log p, shape [N, ...]."""
        log_p = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Class indices, shape [N, ...]."""
        return jax.random.categorical(key, outputs)

    def fisher_root(self, outputs: jax.Array) -> jax.Array:
        """Columns √p_k (e_k − p), one for each prediction of an example and each class k.

        Shape [predictions · K, *outputs.shape].
        """
        p = jax.nn.softmax(outputs)
        k = outputs.shape[-1]
        columns = jnp.sqrt(p)[..., None, :] * (jnp.eye(k, dtype=p.dtype) - p[..., :, None])
        # [N, predictions, K outputs, K columns] -> one column for each (prediction, k)
        columns = columns.reshape(outputs.shape[0], -1, k, k)
        which = jnp.eye(columns.shape[1], dtype=p.dtype)
        root = jnp.einsum("npok,pq->qknpo", columns, which)
        return root.reshape(-1, *outputs.shape)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent sigmoids. Outputs: logits [N, ...]; targets: 0 or 1, the same shape."""

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """−log p, shape [N, ...]."""
        return jax.nn.softplus(outputs) - outputs * targets.astype(outputs.dtype)

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Booleans, shape [N, ...]."""
        return jax.random.bernoulli(key, jax.nn.sigmoid(outputs))

    def fisher_root(self, outputs: jax.Array) -> jax.Array:
        """Columns √(p(1−p)) e_k. Shape [outputs of an example, *outputs.shape]."""
        p = jax.nn.sigmoid(outputs)
        return _diagonal_root(jnp.sqrt(p * (1 - p)))


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions. Outputs: means [N, ...]; targets: the same shape.

    Attributes:
        variance: σ², positive. The corresponding loss is ‖targets − outputs‖² / 2σ².
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        check_number("variance", self.variance, 0, math.inf, "1.0 is usual", open_low=True)

    def neg_log_prob(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """−log p up to a constant, shape [N, ...]."""
        return (targets - outputs) ** 2 / (2 * self.variance)

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Real targets, the shape of `outputs`."""
        noise = jax.random.normal(key, outputs.shape, outputs.dtype)
        return outputs + jnp.sqrt(jnp.asarray(self.variance, outputs.dtype)) * noise

    def fisher_root(self, outputs: jax.Array) -> jax.Array:
        """Columns e_k / σ. Shape [outputs of an example, *outputs.shape]."""
        return _diagonal_root(jnp.full_like(outputs, 1 / math.sqrt(self.variance)))


def fisher_stats(
    predict_fn: Callable[..., PyTree],
    layers: Layers,
    *,
    likelihood: Likelihood,
    estimator: Estimator = "sampled",
    has_aux: bool = False,
    mode: Mode = "raw",
    factors: FactorKind = "exact",
) -> Callable[..., PyTree]:
    """Curvature statistics from labels that the model itself predicts.

    Args:
        predict_fn: function of (params, *args, **kwargs) that returns the outputs, an array with
            the batch as leading axis, such as logits.
        layers: from `find_layers`.
        likelihood: `Categorical`, `Bernoulli`, `Gaussian`, or any object with
            ``neg_log_prob(outputs, targets)``, ``sample(key, outputs)`` and, for ``"exact"``,
            ``fisher_root(outputs)``: columns r_c [columns, *outputs.shape] with Σ_c r_c r_cᵀ the
            Fisher matrix of an example's outputs.
        estimator: ``"sampled"``: one label drawn for each prediction, one backward pass.
            ``"exact"``: the expectation over labels, one backward pass for each column, all held
            in memory: for tests and small problems. Only for TEKFAC and TKFAC: the factor A of
            KFAC and EKFAC would count every column, so they count a failure instead.
        has_aux: whether `predict_fn` returns ``(outputs, aux)``.
        mode: ``"raw"`` or, with sampled labels, ``"reduced"``, as in `value_grad_and_stats`.
        factors: with ``mode="reduced"``, which factors, as in `value_grad_and_stats`.

    Returns:
        Function of (params, *args, key=None, **kwargs) that returns `stats`, or
        ``(aux, stats)``. `key` is a JAX random key, needed for ``"sampled"`` only. With
        ``mode="reduced"`` it takes ``opt_state=`` and ``when=`` too, as in `value_grad_and_stats`.

    Raises:
        ValueError: unknown estimator, mode or factors; reduced statistics of the exact estimator;
            a likelihood without a method that the estimator needs; when called: no key for
            ``"sampled"``, or as in `value_grad_and_stats`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> def predict_fn(params, x):
        ...     return model.apply({"params": params}, x)
        >>> layers = tekfac.find_layers(predict_fn, params, x)
        >>> stats_fn = tekfac.fisher_stats(predict_fn, layers, likelihood=tekfac.Categorical())
        >>> stats_fn(params, x, key=jax.random.key(1)).layers["~"][0].u.shape
        (8, 3)
    """
    check_layers(layers)
    check_function("predict_fn", predict_fn)
    check_flag("has_aux", has_aux)
    check_choice("estimator", estimator, ("sampled", "exact"))
    _check_likelihood(likelihood, estimator)
    if estimator == "exact" and mode == "reduced":
        raise ValueError(
            'mode="reduced" needs estimator="sampled": the exact estimator holds a capture for '
            "each column of the Fisher root in any case"
        )

    def run(
        make_collector: MakeCollector,
        params: Params,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> StatisticsOfBatch | tuple[PyTree, StatisticsOfBatch]:
        key = cast("jax.Array | None", kwargs.pop("key", None))
        if estimator == "sampled" and key is None:
            raise ValueError('estimator="sampled" draws labels: pass key=jax.random.key(...)')
        if estimator == "sampled":
            check_key(key)
        plan = batch_plan(predict_fn, layers, params, args, kwargs)
        _check_outputs(plan.trace.output, has_aux)
        size = jnp.asarray(plan.batch_size, jnp.result_type(float))
        collector = make_collector(plan, size, size)

        # Forward pass: the outputs, and the map from a gradient of the outputs to the statistics.
        outputs_of = functools.partial(collector.run, params)
        outputs, pull_back, *aux = jax.vjp(outputs_of, collector.slots(), has_aux=has_aux)

        # Backward pass: once with sampled labels, or once for each column of the Fisher root.
        if estimator == "sampled":
            assert key is not None
            u = _sampled_gradient(likelihood, key, outputs)
            (found,) = pull_back(u / plan.batch_size)
        else:
            assert _has_fisher_root(likelihood)
            root = likelihood.fisher_root(outputs).astype(outputs.dtype)
            (columns,) = jax.vmap(pull_back)(root / plan.batch_size)
            found = {
                path: jax.tree.map(functools.partial(_columns_as_examples, spec), columns[path])
                for path, spec in layers.items()
            }
        stats = collector.finish(found)
        return (aux[0], stats) if has_aux else stats

    return statistics_function(run, layers, mode, factors)


def _has_fisher_root(likelihood: Likelihood) -> TypeGuard[_WithFisherRoot]:
    return hasattr(likelihood, "fisher_root")


def _check_likelihood(likelihood: Likelihood, estimator: Estimator) -> None:
    """Raises for a likelihood without a method that the estimator needs."""
    kind = type(likelihood).__name__
    if estimator == "exact" and not _has_fisher_root(likelihood):
        raise ValueError(
            f'estimator="exact" needs fisher_root(outputs), which {kind} does not have; use '
            'estimator="sampled"'
        )
    needed = ("neg_log_prob", "sample") if estimator == "sampled" else ()
    if missing := [name for name in needed if not hasattr(likelihood, name)]:
        raise ValueError(
            f"likelihood must have {' and '.join(missing)}, which {kind} does not have; use "
            "tekfac_jax.Categorical(), for example"
        )


def _sampled_gradient(likelihood: Likelihood, key: jax.Array, outputs: jax.Array) -> jax.Array:
    """Gradient of the summed loss with respect to the outputs, for labels drawn from the model."""
    targets = likelihood.sample(key, outputs)
    return jax.grad(lambda s: jnp.sum(likelihood.neg_log_prob(s, targets)))(outputs)


def _check_outputs(output: PyTree, has_aux: bool) -> None:
    if has_aux:
        if not isinstance(output, tuple) or len(output) != 2:
            raise ValueError("with has_aux=True predict_fn must return a pair (outputs, aux)")
        output = output[0]
    dtype, shape = getattr(output, "dtype", None), getattr(output, "shape", ())
    no_array = type(output) is jax.ShapeDtypeStruct  # the trace marks arrays by a subclass
    real = not no_array and dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not real or not shape or not math.prod(shape):
        what = (
            type(output).__name__
            if no_array or dtype is None
            else f"shape {shape} and dtype {dtype}"
        )
        raise ValueError(
            "predict_fn must return one real array with the batch as leading axis, such as logits, "
            f"got {what}; to return more, return (outputs, aux) and pass has_aux=True"
        )


def _columns_as_examples(spec: LayerSpec, x: jax.Array) -> jax.Array:
    """Treats each column as another set of examples; sums are still divided by N."""
    batch = len(spec.stack)
    x = jnp.moveaxis(x, 0, batch)
    return x.reshape(*x.shape[:batch], -1, *x.shape[batch + 2 :])


def _diagonal_root(diagonal: jax.Array) -> jax.Array:
    """One column for each output of an example. [N, ...] -> [outputs, N, ...]."""
    flat = diagonal.reshape(diagonal.shape[0], -1)
    which = jnp.eye(flat.shape[1], dtype=flat.dtype)
    return jnp.einsum("nd,cd->cnd", flat, which).reshape(-1, *diagonal.shape)
