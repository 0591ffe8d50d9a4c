"""Refreshes average over steps, and Θ follows a new basis."""

import jax
import numpy as np
import pytest

import tekfac_jax as tekfac
from tests import oracles
from tests.capturing import simple_case, x64
from tests.oracles import SCALE_BY, every_case, make_case, relative

EXACT = 1e-12


@pytest.mark.sampled(spread=True)
@x64
@every_case
@pytest.mark.parametrize("sibling", ["tekfac", "ekfac"])
def test_theta_follows_the_basis_when_it_is_refreshed(name, sibling):
    """If only the basis is refreshed, Θ is the old operator's diagonal in the new basis."""
    case = make_case(name)
    layers = case.layers()
    tx = SCALE_BY[sibling](
        layers, factor_interval=1, eigenbasis_interval=1, rescaling_interval=100, factor_decay=0.5
    )
    grads, stats = case.grads_and_stats(layers)
    update = jax.jit(lambda state, stats: tx.update(grads, state, stats=stats)[1])
    first = update(tx.init(case.params), stats)
    half = len(case.x) // 2
    _, other = case.grads_and_stats(layers, case.x[:half], case.y[:half])
    second = update(first, other)
    old, new = (tekfac.curvature(s)[case.path] for s in (first, second))
    q = np.kron(new.q_phi, new.q_psi)
    assert relative(new.theta.ravel(), np.diag(q.T @ oracles.operator(old) @ q)) <= EXACT
    assert relative(new.q_phi, old.q_phi) > 1e-3  # the basis did change


@x64
def test_averages_weigh_the_old_value_with_the_decay_and_are_debiased():
    """After x₁, x₂: (β(1−β)x₁ + (1−β)x₂) / (1−β²), for the raw factors and for Θ."""
    a, u = np.random.default_rng(5).normal(size=(2, 2, 9, 3))
    params, layers, first = oracles.dense_statistics(a[0], u[0])
    second = oracles.dense_statistics(a[1], u[1])[2]
    # The basis is kept, so Θ is averaged without being transported.
    tx = tekfac.scale_by_tekfac(
        layers, factor_interval=1, eigenbasis_interval=9, rescaling_interval=1,
        factor_decay=0.8, rescaling_decay=0.6,
    )  # fmt: skip
    update = jax.jit(lambda state, stats: tx.update(params, state, stats=stats)[1])
    state = update(tx.init(params), first)
    c = tekfac.curvature(update(state, second))["~"]
    g = np.einsum("bni,bno->bnio", a, u)
    phi = np.einsum("bnio,bnjo->bij", g, g) / 9
    theta = ((np.asarray(c.q_phi).T @ g @ np.asarray(c.q_psi)) ** 2).mean(axis=1)

    def average(beta, x):
        return (beta * (1 - beta) * x[0] + (1 - beta) * x[1]) / (1 - beta**2)

    expected = average(0.8, phi)
    assert float(c.delta) == pytest.approx(np.trace(expected), rel=EXACT)
    assert relative(c.phi, expected / np.trace(expected)) <= EXACT
    assert relative(c.theta, average(0.6, theta)) <= EXACT


@pytest.mark.parametrize("rescaling", ["exact", "running"])
def test_a_batch_without_examples_that_count_changes_nothing(rescaling):
    """Neither the averages nor the count of failures, wherever Θ comes from."""
    loss, params, x, layers = simple_case()
    tx = tekfac.scale_by_tekfac(
        layers, rescaling=rescaling, factor_interval=1, rescaling_interval=1
    )

    @jax.jit
    def update(state, examples):
        fn = tekfac.value_grad_and_stats(loss, layers, examples=examples)
        _, grads, stats = fn(params, x)
        return tx.update(grads, state, params, stats=stats)[1]

    before = update(tx.init(params), len(x))
    after = update(before, 0)
    for path, layer in before.layers.items():
        assert (layer.theta_weight > 0).all()
        for name in ("phi", "psi", "theta", "theta_weight", "failures"):
            np.testing.assert_array_equal(
                getattr(after.layers[path], name), getattr(layer, name), err_msg=name
            )
