"""Statistics from the model's own distribution, against the Gauss-Newton matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature.chunks import sum_over_examples
from tekfac_jax._curvature.dense import exact_factors
from tekfac_jax._layers.matrices import to_matrices
from tests import oracles
from tests.capturing import (
    EXACT,
    Net,
    captured_gradients,
    mlp,
    randn,
    random_params,
    relative_error,
    x64,
)
from tests.oracles import MONTE_CARLO_SIGMAS, every_case, make_case, relative


class Fixed(NamedTuple):
    """A user-defined likelihood: a unit-variance normal whose labels are known in advance."""

    targets: jax.Array

    def neg_log_prob(self, outputs, targets):
        return (targets - outputs) ** 2 / 2

    def sample(self, key, outputs):
        del key
        return self.targets


# name -> (likelihood, input shape)
_LIKELIHOODS = {
    "categorical": (tekfac.Categorical(), (5, 4)),
    "categorical positions": (tekfac.Categorical(), (5, 2, 4)),
    "bernoulli": (tekfac.Bernoulli(), (5, 4)),
    "bernoulli positions": (tekfac.Bernoulli(), (5, 2, 4)),
    "gaussian": (tekfac.Gaussian(), (5, 4)),
    "gaussian positions": (tekfac.Gaussian(variance=0.3), (5, 2, 4)),
}


def fisher_case(shape):
    model, x = Net(mlp), randn(*shape)
    params = random_params(model, x)

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, x, tekfac.find_layers(predict, params, x)


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("name", _LIKELIHOODS)
def test_sampled_labels(name):
    likelihood, shape = _LIKELIHOODS[name]
    predict, params, x, layers = fisher_case(shape)
    key = jax.random.key(4)
    stats = jax.jit(tekfac.fisher_stats(predict, layers, likelihood=likelihood))(params, x, key=key)
    targets = likelihood.sample(key, predict(params, x))

    def losses(params, x):
        nll = likelihood.neg_log_prob(predict(params, x), targets)
        return nll.reshape(len(x), -1).sum(axis=1)

    expected = jax.jacrev(losses)(params, x)
    expected = jax.vmap(lambda grads: to_matrices(grads, layers))(expected)
    for path, g in captured_gradients(layers, stats).items():
        assert relative_error(g, expected[path]) <= EXACT
    assert stats.examples == 5


@pytest.mark.slow
@x64
def test_reduced_statistics_of_sampled_labels():
    """With the same labels, reduced statistics are the sums of the raw ones."""
    predict, params, x, layers = fisher_case((5, 2, 4))
    options = {"likelihood": tekfac.Categorical(), "has_aux": True}
    tx = tekfac.scale_by_tekfac(layers, factor_interval=1, rescaling_interval=1)
    key = jax.random.key(4)

    def with_aux(params, x):
        return predict(params, x), "aux"

    def states(params, x):
        grads = jax.tree.map(jnp.zeros_like, params)
        raw_state = reduced_state = tx.init(params)
        for _ in range(2):
            aux, raw = tekfac.fisher_stats(with_aux, layers, **options)(params, x, key=key)
            fn = tekfac.fisher_stats(with_aux, layers, mode="reduced", **options)
            reduced_aux, reduced = fn(params, x, key=key, opt_state=reduced_state)
            assert aux == reduced_aux == "aux"
            _, raw_state = tx.update(grads, raw_state, stats=raw)
            _, reduced_state = tx.update(grads, reduced_state, stats=reduced)
        return tekfac.curvature(raw_state), tekfac.curvature(reduced_state)

    for one, other in zip(*map(jax.tree.leaves, jax.jit(states)(params, x)), strict=True):
        assert relative_error(one, other) <= EXACT
    fn = tekfac.fisher_stats(predict, layers, likelihood=tekfac.Categorical(), mode="reduced")
    assert fn(params, x, key=key, when=False).examples == 0
    with pytest.raises(ValueError, match='mode="reduced" needs estimator="sampled"'):
        tekfac.fisher_stats(predict, layers, estimator="exact", mode="reduced", **options)


def output_fisher(likelihood, outputs):
    """Hessian of one example's expected −log p, [outputs, outputs]."""

    def at(moved):
        if isinstance(likelihood, tekfac.Categorical):
            p = jax.lax.stop_gradient(jax.nn.softmax(outputs))
            return -jnp.sum(p * jax.nn.log_softmax(moved))
        if isinstance(likelihood, tekfac.Bernoulli):
            p = jax.lax.stop_gradient(jax.nn.sigmoid(outputs))
            return -jnp.sum(p * jax.nn.log_sigmoid(moved) + (1 - p) * jax.nn.log_sigmoid(-moved))
        return jnp.sum((moved - jax.lax.stop_gradient(outputs)) ** 2) / (2 * likelihood.variance)

    return jax.hessian(at)(outputs).reshape(outputs.size, outputs.size)


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("name", _LIKELIHOODS)
def test_exact_fisher_is_the_gauss_newton_block(name):
    likelihood, shape = _LIKELIHOODS[name]
    predict, params, x, layers = fisher_case(shape)
    fn = tekfac.fisher_stats(predict, layers, likelihood=likelihood, estimator="exact")
    stats = jax.jit(fn)(params, x)
    captured = captured_gradients(layers, stats)

    @jax.jit
    def jacobians(params, x):
        def one(x):
            jacobian = jax.jacrev(lambda params: predict(params, x[None]).reshape(-1))(params)
            h = output_fisher(likelihood, predict(params, x[None])[0])
            return jax.vmap(lambda grads: to_matrices(grads, layers))(jacobian), h

        return jax.vmap(one)(x)

    jacobian, h = jacobians(params, x)
    for path, g in captured.items():
        j = jacobian[path].reshape(*h.shape[:2], -1)
        expected = jnp.einsum("nki,nkl,nlj->ij", j, h, j) / len(x)
        g = g.reshape(len(g), -1)
        assert relative_error(g.T @ g / stats.examples, expected) <= EXACT


@x64
def test_likelihood_of_the_users_own():
    predict, params, x, layers = fisher_case((5, 4))
    likelihood = Fixed(randn(5, 3, seed=9))
    stats = tekfac.fisher_stats(predict, layers, likelihood=likelihood)(
        params, x, key=jax.random.key(0)
    )
    u = (predict(params, x) - likelihood.targets) / len(x)  # Dense_1 is the last layer
    assert relative_error(stats.layers["Dense_1"][0].u, u) <= EXACT
    with pytest.raises(ValueError, match=r"fisher_root.*Fixed.*sampled"):
        tekfac.fisher_stats(predict, layers, likelihood=likelihood, estimator="exact")


def test_fisher_stats_with_aux():
    predict, params, x, layers = fisher_case((5, 4))

    def with_aux(params, x):
        return predict(params, x), {"mean": x.mean()}

    for estimator in ("sampled", "exact"):
        fn = tekfac.fisher_stats(
            with_aux, layers, likelihood=tekfac.Categorical(), estimator=estimator, has_aux=True
        )
        aux, stats = fn(params, x, key=jax.random.key(0))
        assert aux["mean"] == x.mean()
        assert set(stats.layers) == set(layers)


def test_fisher_stats_errors():
    predict, params, x, layers = fisher_case((5, 4))
    with pytest.raises(ValueError, match=r'"sampled", "exact".*got \'best\''):
        tekfac.fisher_stats(predict, layers, likelihood=tekfac.Bernoulli(), estimator="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"pass key="):
        tekfac.fisher_stats(predict, layers, likelihood=tekfac.Bernoulli())(params, x)
    with pytest.raises(ValueError, match=r"variance.*got 0"):
        tekfac.Gaussian(variance=0)
    with pytest.raises(ValueError, match="find_layers"):
        tekfac.fisher_stats(predict, params, likelihood=tekfac.Bernoulli())(
            params, x, key=jax.random.key(0)
        )


# --- the generalized Gauss-Newton matrix ---------------------------------------------------------


def _generalized_gauss_newton(case):
    """E[Jᵀ H J] of the case's layer, where H is the Hessian of the loss at the outputs."""
    jacobian = jax.jacobian(case.outputs)(case.params, case.x)[case.path]
    outputs = case.outputs(case.params, case.x)
    n, k = len(case.x), outputs.shape[-1]
    names = ["kernel", "bias"] if "bias" in jacobian else ["kernel"]
    parts = [np.asarray(jacobian[name]).reshape(n, outputs[0].size // k, k, -1) for name in names]
    j = np.concatenate(parts, axis=-1)
    p = np.asarray(jax.nn.softmax(outputs)).reshape(n, -1, k)
    h = np.einsum("ntk,kl->ntkl", p, np.eye(k)) - np.einsum("ntk,ntl->ntkl", p, p)
    return np.einsum("ntkp,ntkl,ntlq->pq", j, h, j) / n


@pytest.mark.slow
@x64
@every_case
def test_exact_fisher_is_the_generalized_gauss_newton_matrix(name):
    case = make_case(name)
    layers = case.layers()
    stats_fn = tekfac.fisher_stats(
        case.outputs, layers, likelihood=tekfac.Categorical(), estimator="exact"
    )
    grads, _ = case.grads_and_stats(layers)
    _, state = oracles.one_update(case, "tekfac", grads, stats_fn(case.params, case.x))
    c = tekfac.curvature(state)[case.path]
    f = _generalized_gauss_newton(case)
    q = np.kron(c.q_phi, c.q_psi)
    assert relative(c.theta.ravel(), np.diag(q.T @ f @ q)) <= 1e-10
    phi, psi = oracles.partial_traces(f, *c.theta.shape)
    assert relative(c.phi, phi / np.trace(f)) <= 1e-10
    assert relative(c.psi, psi / np.trace(f)) <= 1e-10


@pytest.mark.slow
@x64
@pytest.mark.parametrize("name", ["dense", "dense positions", "conv strided"])
def test_sampled_fisher_tends_to_the_generalized_gauss_newton_matrix(name):
    case, draws = make_case(name), 2000
    layers = case.layers()
    spec = layers[case.path]
    stats_fn = tekfac.fisher_stats(case.outputs, layers, likelihood=tekfac.Categorical())

    def squared_norm(key):
        stats = stats_fn(case.params, case.x, key=key)
        total = sum_over_examples(
            exact_factors, spec, stats.layers[case.path], stats.scale, jnp.float64
        )
        return jnp.diagonal(total.psi) / len(case.x)

    samples = np.asarray(
        jax.lax.map(jax.jit(squared_norm), jax.random.split(jax.random.key(0), draws))
    )
    f = _generalized_gauss_newton(case)
    _, psi = oracles.partial_traces(f, spec.in_dim, spec.out_dim)
    error = np.abs(samples.mean(axis=0) - np.diag(psi))
    assert np.all(error <= MONTE_CARLO_SIGMAS * samples.std(axis=0) / np.sqrt(draws))
