"""The property table of the method, each row against brute force in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature.chunks import sum_over_examples
from tekfac_jax._curvature.dense import exact_factors, location_factors, plain_factors, rescaling
from tekfac_jax._curvature.eigenbasis import precondition, transport
from tekfac_jax._curvature.normal_form import normal_form
from tests import oracles
from tests.oracles import CASE_NAMES, SCALE_BY, SINGLE_POSITION, make_case, relative

EXACT = 1e-12
# Standard errors of a Monte-Carlo mean that are taken as agreement.
MONTE_CARLO_SIGMAS = 5.0

pytestmark = pytest.mark.usefixtures("x64")
every_case = pytest.mark.parametrize("name", CASE_NAMES)
every_sibling = pytest.mark.parametrize("sibling", SCALE_BY)


def contract(case, contraction):
    """A contraction's mean over the examples, as the transforms compute it."""
    layers = case.layers()
    _, stats = case.grads_and_stats(layers)
    captures = stats.layers[case.path]

    @jax.jit
    def total(captures, scale):
        return sum_over_examples(contraction, layers[case.path], captures, scale, jnp.float64)

    return jax.tree.map(lambda x: np.asarray(x) / len(case.x), total(captures, stats.scale))


# Row 1 -------------------------------------------------------------------------------------------


@pytest.mark.sampled(spread=True)
@every_case
def test_captures_are_per_example_gradients(name):
    case = make_case(name)
    layers = case.layers()
    grads, stats = case.grads_and_stats(layers)
    a, u = normal_form(layers[case.path], stats.layers[case.path][0], jnp.float64)
    g = jnp.einsum("nti,nto->nio", a, u) * stats.scale
    assert relative(g, oracles.per_example_matrices(name)) <= EXACT
    assert relative(g.mean(axis=0), oracles.matrix(grads[case.path])) <= EXACT


# Rows 2, 3 ---------------------------------------------------------------------------------------


@pytest.mark.sampled(spread=True)
@every_case
@pytest.mark.parametrize("factors", [exact_factors, location_factors])
def test_traces_of_both_factors_are_equal(name, factors):
    phi, psi = contract(make_case(name), factors)
    assert np.trace(phi) == pytest.approx(np.trace(psi), rel=EXACT)


@pytest.mark.sampled(spread=True)
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


@pytest.mark.parametrize("inputs", [511, 512, 513])
def test_wide_layers_are_contracted_in_blocks(inputs):
    rng = np.random.default_rng(0)
    a, u = (rng.normal(size=(2, 3, width)) for width in (inputs, 2))
    g = np.einsum("nti,nto->nio", a, u)
    phi, psi = exact_factors(jnp.asarray(a), jnp.asarray(u))
    assert relative(phi, sum(x @ x.T for x in g)) <= EXACT
    assert relative(psi, sum(x.T @ x for x in g)) <= EXACT


# Row 4 -------------------------------------------------------------------------------------------


@pytest.mark.sampled(spread=True)
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
@pytest.mark.parametrize(("t", "i", "o"), [(1, 5, 4), (3, 7, 5), (6, 9, 4), (6, 4, 9), (12, 5, 3)])
def test_every_contraction_order_gives_the_same_rescaling(t, i, o):
    rng = np.random.default_rng(0)
    a, u = rng.normal(size=(4, t, i)), rng.normal(size=(4, t, o))
    q_phi, q_psi = oracles.random_orthogonal(1, i), oracles.random_orthogonal(2, o)
    g = np.einsum("nti,nto->nio", a, u)
    expected = ((q_phi.T @ g @ q_psi) ** 2).sum(axis=0)
    assert relative(rescaling(*map(jnp.array, (a, u, q_phi, q_psi))), expected) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 7, 8, 9, 21])
def test_chunks_of_examples_add_up(n):
    case = make_case("conv strided")
    x, y = (jnp.concatenate([v, v])[:n] for v in (case.x, case.y))
    layers = case.layers()
    _, stats = case.grads_and_stats(layers, x, y)
    spec, captures = layers[case.path], stats.layers[case.path]
    total = sum_over_examples(exact_factors, spec, captures, stats.scale, jnp.float64)
    a, u = normal_form(spec, captures[0], jnp.float64)
    whole = exact_factors(a, u * stats.scale)
    assert relative(total.phi, whole.phi) <= EXACT
    assert relative(total.psi, whole.psi) <= EXACT


# Rows 5, 6, 7 ------------------------------------------------------------------------------------


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


# Row 9 -------------------------------------------------------------------------------------------


def _dense_statistics(a, u):
    """A bare dense layer without bias, with statistics made by hand (T = 1)."""
    model = nn.Dense(u.shape[1], use_bias=False, param_dtype=jnp.float64)
    x = jnp.asarray(a)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return jnp.sum(model.apply({"params": params}, x))

    layers = tekfac.find_layers(loss, params, x)
    stats = tekfac.Statistics({"~": (tekfac.Capture(x, jnp.asarray(u)),)}, jnp.float64(1))
    return params, layers, stats


def _operators(a, u):
    """Each sibling's operator for statistics made by hand."""
    params, layers, stats = _dense_statistics(a, u)
    result = {}
    for name, scale_by in SCALE_BY.items():
        tx = scale_by(layers)
        _, state = jax.jit(tx.update)(params, tx.init(params), stats=stats)
        result[name] = oracles.operator(tekfac.curvature(state)["~"])
    return result


def test_independent_factors_make_all_four_exact():
    rng = np.random.default_rng(0)
    inputs, outputs = rng.normal(size=(5, 3)), rng.normal(size=(4, 2))
    # Every input with every output: a and u are independent under the empirical distribution.
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


# Row 10 ------------------------------------------------------------------------------------------


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


# Row 11 ------------------------------------------------------------------------------------------


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
        params, layers, stats = _dense_statistics(a, u)
        tx = SCALE_BY[sibling](layers, damping="trace")
        return tx.update({"kernel": jnp.array(g)}, tx.init(params), stats=stats)[0]["kernel"]

    turned = direction(a @ left, u @ right, left.T @ g @ right)
    assert relative(turned, left.T @ direction(a, u, g) @ right) <= 1e-10


# Row 12 ------------------------------------------------------------------------------------------


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


@pytest.mark.sampled(spread=True)
@every_case
def test_transport_is_the_diagonal_of_the_old_operator_in_the_new_basis(name):
    c = oracles.curvature_of(name)
    new = tuple(oracles.random_orthogonal(s, len(q)) for s, q in enumerate((c.q_phi, c.q_psi)))
    old = jax.tree.map(jnp.asarray, c)
    theta, _ = transport(
        old.theta, jnp.float64(0), (old.q_phi, old.q_psi), tuple(map(jnp.array, new))
    )
    q = np.kron(*new)
    assert relative(theta.ravel(), np.diag(q.T @ oracles.operator(c) @ q)) <= EXACT
    assert float(theta.sum()) == pytest.approx(c.theta.sum(), rel=EXACT)


@pytest.mark.sampled(spread=True)
@every_case
@pytest.mark.parametrize("sibling", ["tekfac", "ekfac"])
def test_theta_follows_the_basis_when_it_is_refreshed(name, sibling):
    """A refresh of the basis alone keeps the old operator's diagonal in the new basis."""
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


# Row 13 ------------------------------------------------------------------------------------------


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
    """Operators from the definitions: KFAC A⊗U, TKFAC δΦ⊗Ψ, and Θ in their eigenbases."""
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


# Row 14 ------------------------------------------------------------------------------------------


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


def _generalized_gauss_newton(case):
    """E[Jᵀ H J] of the case's layer, H the Hessian of the loss at the outputs."""
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


# Row 15 ------------------------------------------------------------------------------------------


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Flax's BatchNorm keeps float32 statistics
def test_batch_norm_in_train_mode_keeps_the_sum():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(3, (3, 3), use_bias=False, param_dtype=x.dtype, name="conv")(x)
            x = nn.BatchNorm(use_running_average=False, param_dtype=x.dtype)(x)
            x = jnp.tanh(x).mean(axis=(1, 2))
            return nn.Dense(3, param_dtype=x.dtype, name="head")(x)

    model = Net()
    x = jax.random.normal(jax.random.key(0), (10, 5, 4, 2), jnp.float64)
    y = jax.random.randint(jax.random.key(1), (10,), 0, 3)
    variables = model.init(jax.random.key(2), x)

    def loss(params, batch_stats, x, y):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

    args = variables["params"], variables["batch_stats"], x, y
    layers = tekfac.find_layers(loss, *args)
    assert set(layers) == {"conv", "head"}
    fn = tekfac.value_grad_and_stats(loss, layers, has_aux=True)
    (_, updates), grads, stats = fn(*args)
    assert set(updates) == {"batch_stats"}
    for path, spec in layers.items():
        a, u = normal_form(spec, stats.layers[path][0], jnp.float64)
        total = jnp.einsum("nti,nto->io", a, u * stats.scale) / len(x)
        assert relative(total, oracles.matrix(grads[path])) <= 1e-11


# Averages ----------------------------------------------------------------------------------------


def test_averages_weigh_the_old_value_with_the_decay_and_are_debiased():
    """After x₁, x₂: (β(1−β)x₁ + (1−β)x₂) / (1−β²), for the raw factors and for Θ."""
    a, u = np.random.default_rng(5).normal(size=(2, 2, 9, 3))
    params, layers, first = _dense_statistics(a[0], u[0])
    second = _dense_statistics(a[1], u[1])[2]
    # The basis stays, so that Θ is averaged without being transported.
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
