"""The method's theorems and invariances against brute force in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature.dense import exact_factors, location_factors, plain_factors
from tekfac_jax._curvature.eigenbasis import precondition, transport
from tests import oracles
from tests.contracting import contract
from tests.oracles import (
    MONTE_CARLO_SIGMAS,
    SCALE_BY,
    every_case,
    every_sibling,
    make_case,
    relative,
)

EXACT = 1e-12

pytestmark = pytest.mark.usefixtures("x64")


# --- the factors ---------------------------------------------------------------------------------


@pytest.mark.sampled(spread=True)
@every_case
@pytest.mark.parametrize("factors", [exact_factors, location_factors])
def test_traces_of_both_factors_are_equal(name, factors):
    phi, psi = contract(make_case(name), factors)
    assert np.trace(phi) == pytest.approx(np.trace(psi), rel=EXACT)


# --- errors of the approximations ----------------------------------------------------------------


@pytest.mark.sampled(spread=True)
@every_case
@pytest.mark.parametrize("sibling", ["tekfac", "ekfac"])
def test_error_of_the_measured_diagonal(name, sibling):
    f = oracles.fisher(oracles.per_example_matrices(name))
    curvature = oracles.curvature_of(name, sibling)
    error = np.linalg.norm(f - oracles.operator(curvature)) ** 2
    predicted = np.linalg.norm(f) ** 2 - np.linalg.norm(curvature.theta) ** 2
    assert error == pytest.approx(predicted, rel=1e-9, abs=1e-12 * np.linalg.norm(f) ** 2)
    for seed in range(3):
        noise = 0.01 * np.random.default_rng(seed).normal(size=curvature.theta.shape)
        other = curvature._replace(theta=curvature.theta * (1 + noise))
        assert np.linalg.norm(f - oracles.operator(other)) ** 2 > error


@pytest.mark.sampled(spread=True)
@every_case
@pytest.mark.parametrize("factors", ["exact", "location"])
@pytest.mark.parametrize(("better", "worse"), [("tekfac", "tkfac"), ("ekfac", "kfac")])
def test_theorem_3_1(name, factors, better, worse):
    f = oracles.fisher(oracles.per_example_matrices(name))
    errors = {
        sibling: np.linalg.norm(
            f - oracles.operator(oracles.curvature_of(name, sibling, factors=factors))
        )
        for sibling in (better, worse)
    }
    assert errors[better] <= errors[worse] * (1 + EXACT)


# --- when an approximation is exact --------------------------------------------------------------


def _operators(a, u):
    """Each sibling's operator for statistics made by hand."""
    params, layers, stats = oracles.dense_statistics(a, u)
    result = {}
    for name, scale_by in SCALE_BY.items():
        tx = scale_by(layers)
        _, state = jax.jit(tx.update)(params, tx.init(params), stats=stats)
        result[name] = oracles.operator(tekfac.curvature(state)["~"])
    return result


def test_independent_factors_make_all_four_exact():
    rng = np.random.default_rng(0)
    inputs, outputs = rng.normal(size=(5, 3)), rng.normal(size=(4, 2))
    # Every input is paired with every output, so a and u are empirically independent.
    a, u = np.repeat(inputs, 4, axis=0), np.tile(outputs, (5, 1))
    f = oracles.fisher(np.einsum("ni,no->nio", a, u))
    for name, operator in _operators(a, u).items():
        assert relative(operator, f) <= EXACT, name


def test_constant_norms_make_tkfac_kfac():
    rng = np.random.default_rng(1)
    a, u = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    operators = _operators(a, u)
    assert relative(operators["tkfac"], operators["kfac"]) <= EXACT


def test_one_example_makes_tkfac_exact():
    rng = np.random.default_rng(2)
    a, u = rng.normal(size=(1, 3)), rng.normal(size=(1, 2))
    f = oracles.fisher(np.einsum("ni,no->nio", a, u))
    assert relative(_operators(a, u)["tkfac"], f) <= EXACT


@pytest.mark.slow
def test_deep_linear_network_makes_tkfac_exact():
    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (4, 3, 2):
                x = nn.Dense(features, use_bias=False, param_dtype=jnp.float64)(x)
            return x

    model = Linear()
    x = jax.random.normal(jax.random.key(0), (12, 5), jnp.float64)
    params = model.init(jax.random.key(1), x)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x)

    layers = tekfac.find_layers(predict, params, x)
    stats_fn = tekfac.fisher_stats(predict, layers, likelihood=tekfac.Gaussian(), estimator="exact")
    tx = tekfac.scale_by_tkfac(layers)
    _, state = tx.update(params, tx.init(params), stats=stats_fn(params, x))
    jacobians = jax.jacobian(predict)(params, x)
    for path in layers:
        j = np.asarray(jacobians[path]["kernel"]).reshape(len(x), 2, -1)
        f = np.einsum("nkp,nkq->pq", j, j) / len(x)
        assert relative(oracles.operator(tekfac.curvature(state)[path]), f) <= EXACT


# --- invariances ---------------------------------------------------------------------------------


@pytest.mark.sampled(spread=True)
@every_case
@every_sibling
def test_scaling_the_loss(name, sibling):
    case, c = make_case(name), 7.0
    grads, stats = case.grads_and_stats()
    scaled = stats._replace(scale=stats.scale * c), jax.tree.map(lambda g: c * g, grads)
    options = {"damping": "trace", "trace_floor": 0.0}
    update, state = oracles.one_update(case, sibling, grads, stats, **options)
    scaled_update, scaled_state = oracles.one_update(case, sibling, scaled[1], scaled[0], **options)
    plain, times = (tekfac.curvature(s)[case.path] for s in (state, scaled_state))
    assert relative(times.phi, plain.phi) <= EXACT
    assert relative(times.psi, plain.psi) <= EXACT
    assert float(times.delta) == pytest.approx(c**2 * float(plain.delta), rel=EXACT)
    assert relative(oracles.operator(times), c**2 * oracles.operator(plain)) <= EXACT
    assert relative(scaled_update, update / c) <= 1e-10


@pytest.mark.sampled(spread=True)
@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum", 5.0])
def test_reduction_undoes_what_the_loss_was_divided_by(name, reduction):
    case = make_case(name)
    divisor = {"mean": len(case.x), "sum": 1.0}.get(reduction, reduction)

    def loss(params, x, y):
        return case.losses(params, x, y).sum() / divisor

    layers = case.layers()
    fn = tekfac.value_grad_and_stats(loss, layers, reduction=reduction)
    _, grads, stats = fn(case.params, case.x, case.y)
    _, state = oracles.one_update(case, "tekfac", grads, stats)
    f = oracles.fisher(oracles.per_example_matrices(name))
    assert float(tekfac.curvature(state)[case.path].delta) == pytest.approx(np.trace(f), rel=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense positions", "conv strided", "conv dilated no bias"])
@every_sibling
def test_permuted_or_duplicated_batch_changes_nothing(name, sibling):
    case = make_case(name)
    update, _ = oracles.one_update(case, sibling)
    order = np.random.default_rng(0).permutation(len(case.x))
    for index in (order, np.tile(order, 2)):
        other = case._replace(x=case.x[index], y=case.y[index])
        assert relative(oracles.one_update(other, sibling)[0], update) <= 1e-9


@every_sibling
def test_orthogonal_change_of_variables_is_followed(sibling):
    rng = np.random.default_rng(3)
    a, u, g = rng.normal(size=(20, 5)), rng.normal(size=(20, 4)), rng.normal(size=(5, 4))
    left, right = oracles.random_orthogonal(1, 5), oracles.random_orthogonal(2, 4)

    def direction(a, u, g):
        params, layers, stats = oracles.dense_statistics(a, u)
        tx = SCALE_BY[sibling](layers, damping="trace")
        return tx.update({"kernel": jnp.array(g)}, tx.init(params), stats=stats)[0]["kernel"]

    turned = direction(a @ left, u @ right, left.T @ g @ right)
    assert relative(turned, left.T @ direction(a, u, g) @ right) <= 1e-10


@pytest.mark.sampled(spread=True)
@every_case
def test_signs_and_order_of_eigenvectors_do_not_matter(name):
    c = oracles.curvature_of(name)
    rng = np.random.default_rng(0)

    def shuffled(q):
        return q[:, rng.permutation(len(q))] * rng.choice([-1.0, 1.0], len(q))

    new = tuple(jnp.asarray(shuffled(q)) for q in (c.q_phi, c.q_psi))
    c = jax.tree.map(jnp.asarray, c)
    theta, _ = transport(c.theta, jnp.float64(0), (c.q_phi, c.q_psi), new)
    g = jnp.asarray(rng.normal(size=theta.shape))
    rest, damping = jnp.float64(0), jnp.float64(1e-3)
    expected = precondition(g, c.q_phi, c.q_psi, c.theta, rest, damping)
    assert relative(precondition(g, *new, theta, rest, damping), expected) <= EXACT


# --- the update against dense solves -------------------------------------------------------------


@pytest.mark.sampled(spread=True)
@every_case
@every_sibling
@pytest.mark.parametrize("damping", ["trace", 0.02])
def test_update_is_the_dense_solve(name, sibling, damping):
    case = make_case(name)
    grads, _ = case.grads_and_stats()
    options = {"damping": damping, "fc_damping": "own", "damping_scale": 0.5}
    update, state = oracles.one_update(case, sibling, **options)
    operator = oracles.operator(tekfac.curvature(state)[case.path])
    rule = max(np.trace(operator), 0.01) / len(operator) if damping == "trace" else damping
    damped = operator + 0.5 * rule * np.eye(len(operator))
    g = np.asarray(oracles.matrix(grads[case.path]))
    assert relative(update.ravel(), np.linalg.solve(damped, g.ravel())) <= 1e-10
    assert np.linalg.norm(update) <= np.linalg.norm(g) / (0.5 * rule)
    assert (update * g).sum() > 0


@pytest.mark.sampled(spread=True)
@every_case
@pytest.mark.parametrize("sibling", ["kfac", "tkfac"])
@pytest.mark.parametrize("damping", ["trace", 0.02])
def test_factored_damping_is_added_to_the_factors(name, sibling, damping):
    """KFAC: A + π√λI and U + √λ/πI; TKFAC: √δΦ + √λI and √δΨ + √λI."""
    case = make_case(name)
    grads, _ = case.grads_and_stats()
    options = {"damping": damping, "fc_damping": "own", "damping_form": "factored"}
    update, state = oracles.one_update(case, sibling, **options)
    root = np.sqrt(float(tekfac.diagnostics(state)[f"{case.path}/damping"]))
    left, right = contract(case, plain_factors if sibling == "kfac" else exact_factors)
    pi = np.sqrt(np.trace(left) / len(left) / (np.trace(right) / len(right)))
    if sibling == "tkfac":
        left, right = (x / np.sqrt(np.trace(left)) for x in (left, right))
        pi = 1.0
    damped = np.kron(left + pi * root * np.eye(len(left)), right + root / pi * np.eye(len(right)))
    g = np.asarray(oracles.matrix(grads[case.path]))
    assert relative(update.ravel(), np.linalg.solve(damped, g.ravel())) <= 1e-10


@pytest.mark.sampled(spread=True)
@every_case
@every_sibling
def test_family_matches_its_definition(name, sibling):
    """KFAC's operator is A⊗U, TKFAC's is δΦ⊗Ψ; the others have Θ in the same eigenbases."""
    case = make_case(name)
    plain = sibling in ("kfac", "ekfac")
    factors = contract(case, plain_factors if plain else exact_factors)
    phi, psi = factors
    product = np.kron(phi, psi) / (1 if plain else np.trace(phi))
    curvature = oracles.curvature_of(name, sibling)
    if sibling in ("kfac", "tkfac"):
        assert relative(oracles.operator(curvature), product) <= 1e-10
        assert curvature.delta == pytest.approx(np.trace(product), rel=EXACT)
        return
    f = oracles.fisher(oracles.per_example_matrices(name))
    for factor, q in ((phi, curvature.q_phi), (psi, curvature.q_psi)):
        rotated = np.asarray(q.T @ factor @ q)
        assert np.linalg.norm(rotated - np.diag(np.diag(rotated))) <= 1e-12 * np.linalg.norm(factor)
    q = np.kron(curvature.q_phi, curvature.q_psi)
    assert relative(curvature.theta.ravel(), np.diag(q.T @ f @ q)) <= 1e-10


@pytest.mark.sampled(spread=True)
@every_case
def test_large_damping_is_the_scaled_gradient(name):
    case = make_case(name)
    grads, _ = case.grads_and_stats()
    update, _ = oracles.one_update(case, damping=1e12)
    assert relative(update * 1e12, oracles.matrix(grads[case.path])) <= 1e-9


# --- running rescaling ---------------------------------------------------------------------------


def test_running_rescaling_has_the_bias_that_is_stated():
    """E[N (Q_Φᵀ ḡ Q_Ψ)²] = Θ + (N−1)μ² over batches drawn with replacement."""
    name = "dense"
    c = oracles.curvature_of(name)
    rotated = np.einsum("ij,nio,op->njp", c.q_phi, oracles.per_example_matrices(name), c.q_psi)
    n, draws = 4, 40_000
    index = np.random.default_rng(0).integers(len(rotated), size=(draws, n))
    samples = n * rotated[index].mean(axis=1) ** 2
    expected = (rotated**2).mean(axis=0) + (n - 1) * rotated.mean(axis=0) ** 2
    error = np.abs(samples.mean(axis=0) - expected)
    assert np.all(error <= MONTE_CARLO_SIGMAS * samples.std(axis=0) / np.sqrt(draws) + 1e-15)


@pytest.mark.sampled(spread=True)
@every_case
def test_running_rescaling_is_the_squared_mean_gradient(name):
    case = make_case(name)
    grads, stats = case.grads_and_stats()
    _, state = oracles.one_update(case, "tekfac", grads, stats, rescaling="running")
    c = tekfac.curvature(state)[case.path]
    mean = oracles.per_example_matrices(name).mean(axis=0)
    expected = len(case.x) * (np.asarray(c.q_phi).T @ mean @ np.asarray(c.q_psi)) ** 2
    assert relative(c.theta, expected) <= 1e-10
