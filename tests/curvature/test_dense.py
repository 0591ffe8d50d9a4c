"""Contractions of dense layers against the dense Fisher matrix, in every order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tekfac_jax._curvature import dense
from tekfac_jax._curvature.cost import FactorOrder, RescalingOrder
from tekfac_jax._curvature.dense import exact_factors, location_factors, plain_factors, rescaling
from tekfac_jax._curvature.normal_form import normal_form
from tests import oracles
from tests.capturing import x64
from tests.contracting import contract
from tests.oracles import SINGLE_POSITION, every_case, make_case, relative

EXACT = 1e-12
SIZES = st.integers(1, 9)
ORDERS = tuple(itertools.product((False, True), repeat=2))
LEADS = st.sampled_from([(), (2,), (2, 3)])


# --- the dense Fisher matrix ---------------------------------------------------------------------


@pytest.mark.sampled(spread=True)
@x64
@every_case
def test_exact_factors_are_partial_traces_of_the_fisher(name):
    case = make_case(name)
    g = oracles.per_example_matrices(name)
    f = oracles.fisher(g)
    phi, psi = oracles.partial_traces(f, *g.shape[1:])
    kinds = (exact_factors, location_factors) if name in SINGLE_POSITION else (exact_factors,)
    for kind in kinds:
        factors = contract(case, kind)
        assert relative(factors.phi, phi) <= EXACT
        assert relative(factors.psi, psi) <= EXACT
    curvature = oracles.curvature_of(name)
    assert curvature.delta == pytest.approx(np.trace(f), rel=EXACT)
    assert relative(curvature.phi, phi / np.trace(phi)) <= EXACT
    assert relative(curvature.psi, psi / np.trace(psi)) <= EXACT


@pytest.mark.sampled(spread=True)
@x64
@every_case
def test_location_and_plain_factors_follow_their_formulas(name):
    case = make_case(name)
    layers = case.layers()
    _, stats = case.grads_and_stats(layers)
    a, u = normal_form(layers[case.path], stats.layers[case.path][0], jnp.float64)
    a, u = np.asarray(a), np.asarray(u * stats.scale)
    n, t = a.shape[:2]
    phi = sum(u[i, j] @ u[i, j] * np.outer(a[i, j], a[i, j]) for i in range(n) for j in range(t))
    psi = sum(a[i, j] @ a[i, j] * np.outer(u[i, j], u[i, j]) for i in range(n) for j in range(t))
    location = contract(case, location_factors)
    assert relative(location.phi, phi / n) <= EXACT
    assert relative(location.psi, psi / n) <= EXACT
    plain = contract(case, plain_factors)
    assert relative(plain.phi, np.einsum("nti,ntj->ij", a, a) / n) <= EXACT
    assert relative(plain.psi, np.einsum("nto,ntp->op", u, u) / (n * t)) <= EXACT


@x64
@pytest.mark.parametrize("inputs", [511, 512, 513])
def test_wide_layers_are_contracted_in_blocks(inputs):
    rng = np.random.default_rng(0)
    a, u = (rng.normal(size=(2, 3, width)) for width in (inputs, 2))
    g = np.einsum("nti,nto->nio", a, u)
    phi, psi = exact_factors(jnp.asarray(a), jnp.asarray(u))
    assert relative(phi, sum(x @ x.T for x in g)) <= EXACT
    assert relative(psi, sum(x.T @ x for x in g)) <= EXACT


@pytest.mark.sampled(spread=True)
@x64
@every_case
def test_rescaling_is_the_diagonal_of_the_rotated_fisher(name):
    case = make_case(name)
    g = oracles.per_example_matrices(name)
    f = oracles.fisher(g)
    q_phi, q_psi = (oracles.random_orthogonal(s, d) for s, d in enumerate(g.shape[1:]))
    theta = contract(case, lambda a, u: rescaling(a, u, jnp.array(q_phi), jnp.array(q_psi)))
    q = np.kron(q_phi, q_psi)
    assert relative(theta.ravel(), np.diag(q.T @ f @ q)) <= EXACT
    assert theta.sum() == pytest.approx(np.trace(f), rel=EXACT)


@pytest.mark.sampled(spread=True)
@x64
@pytest.mark.parametrize(("t", "i", "o"), [(1, 5, 4), (3, 7, 5), (6, 9, 4), (6, 4, 9), (12, 5, 3)])
def test_every_contraction_order_gives_the_same_rescaling(t, i, o):
    rng = np.random.default_rng(0)
    a, u = rng.normal(size=(4, t, i)), rng.normal(size=(4, t, o))
    q_phi, q_psi = oracles.random_orthogonal(1, i), oracles.random_orthogonal(2, o)
    g = np.einsum("nti,nto->nio", a, u)
    expected = ((q_phi.T @ g @ q_psi) ** 2).sum(axis=0)
    assert relative(rescaling(*map(jnp.array, (a, u, q_phi, q_psi))), expected) <= EXACT


# --- orders --------------------------------------------------------------------------------------


def random_captures(lead, n, t, i, o, seed):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(*lead, n, t, d))) for d in (i, o))


def by_einsum(a, u):
    g = np.einsum("...nti,...nto->...nio", a, u)
    return g, np.einsum("...nio,...njo->...ij", g, g), np.einsum("...nio,...nip->...op", g, g)


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, seed=st.integers(0, 99))
def test_factors_in_every_order(order, lead, n, t, i, o, seed):
    a, u = random_captures(lead, n, t, i, o, seed)
    _, phi, psi = by_einsum(a, u)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "factor_order", lambda *_: FactorOrder(*order))
        patch.setattr(dense, "_BLOCK", 3)  # small, so that several blocks are needed
        # A new lambda, so that the program is compiled again with this order.
        found = jax.jit(lambda a, u: dense.exact_factors(a, u))(a, u)
    assert relative(found.phi, phi) <= EXACT
    assert relative(found.psi, psi) <= EXACT


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, r=SIZES, p=SIZES, seed=st.integers(0, 99))
def test_rescaling_in_every_order(order, lead, n, t, i, o, r, p, seed):
    a, u = random_captures(lead, n, t, i, o, seed)
    rng = np.random.default_rng(seed + 1)
    q_phi, q_psi = (jnp.asarray(rng.normal(size=(*lead, d, k))) for d, k in ((i, r), (o, p)))
    g = np.einsum("...ir,...nio,...op->...nrp", q_phi, by_einsum(a, u)[0], q_psi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "rescaling_order", lambda *_: RescalingOrder(*order))
        found = jax.jit(lambda *arrays: dense.rescaling(*arrays))(a, u, q_phi, q_psi)
    assert relative(found, (g**2).sum(axis=-3)) <= EXACT


@pytest.mark.slow
@x64
@pytest.mark.parametrize("way", ["pairs of positions", "example by example", "all at once"])
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, seed=st.integers(0, 99))
def test_squared_gradients_in_every_way(way, lead, n, t, i, o, seed):
    a, u = random_captures(lead, n, t, i, o, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_FEW", 100 if way == "pairs of positions" else 0)
        patch.setattr(dense, "on_cpu", lambda: way == "example by example")
        found = jax.jit(lambda a, u: dense._squared_gradients(a, u))(a, u)
    assert relative(found, (by_einsum(a, u)[0] ** 2).sum(axis=-3)) <= EXACT
    assert float(found.min()) >= 0


@x64
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, r=SIZES, p=SIZES, seed=st.integers(0, 99))
def test_from_gradients_formed_once(lead, n, t, i, o, r, p, seed):
    """Factors and Θ computed from G_n equal those computed from a and u."""
    a, u = random_captures(lead, n, t, i, o, seed)
    rng = np.random.default_rng(seed + 1)
    q_phi, q_psi = (jnp.asarray(rng.normal(size=(*lead, d, k))) for d, k in ((i, r), (o, p)))
    factors, theta = jax.jit(
        lambda g, *q: (
            dense.factors_of_gradients(g),
            dense.rescaling_of_gradients(g, *q),
        )
    )(dense.gradients(a, u), q_phi, q_psi)
    _, phi, psi = by_einsum(a, u)
    assert relative(factors.phi, phi) <= EXACT
    assert relative(factors.psi, psi) <= EXACT
    assert relative(theta, dense.rescaling(a, u, q_phi, q_psi)) <= EXACT
