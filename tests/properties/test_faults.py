"""Injected faults: the step stays usable, and the rest of the curvature is unaffected."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tests.capturing import Net, losses_of, randn, random_params

EVERY_STEP = {"factor_interval": 1, "eigenbasis_interval": 1, "rescaling_interval": 1}
SCALE_BY = {
    "tekfac": tekfac.scale_by_tekfac,
    "tkfac": tekfac.scale_by_tkfac,
    "ekfac": tekfac.scale_by_ekfac,
    "kfac": tekfac.scale_by_kfac,
}
every_member = pytest.mark.parametrize("name", SCALE_BY)
DEVICES = 4


def network(x):
    x = jnp.tanh(nn.Conv(3, (2, 2), name="conv")(x))
    x = nn.relu(nn.Dense(4, name="hidden")(x.reshape(len(x), -1)))
    return nn.Dense(2, name="head")(x)


class Problem:
    """A small network, its statistics, and steps of a transformation."""

    def __init__(self, **options):
        self.model, self.x = Net(network), randn(6, 3, 3, 2)
        self.params = random_params(self.model, self.x)
        self.layers = tekfac.find_layers(self.loss, self.params, self.x)
        self.tx = tekfac.scale_by_tekfac(self.layers, **(EVERY_STEP | options))
        self.update = jax.jit(self.tx.update)
        self.statistics = jax.jit(tekfac.value_grad_and_stats(self.loss, self.layers))

    def loss(self, params, x):
        return losses_of(self.model.apply({"params": params}, x)).mean()

    def step(self, state, spoil=lambda stats: stats, x=None):
        _, grads, stats = self.statistics(self.params, self.x if x is None else x)
        updates, state = self.update(grads, state, stats=spoil(stats))
        return grads, updates, state

    def good_state(self):
        return self.step(self.tx.init(self.params))[2]


def spoil_layer(path, field, value):
    """Replaces one entry of a layer's capture."""

    def spoil(stats):
        (capture,) = stats.layers[path]
        array = getattr(capture, field)
        capture = capture._replace(**{field: array.at[(0,) * array.ndim].set(value)})
        return stats._replace(layers=stats.layers | {path: (capture,)})

    return spoil


def assert_usable(grads, updates):
    """Asserts updates that are finite, and downhill in every layer with a gradient."""
    for layer, own in grads.items():
        products = [jnp.sum(own[k] * updates[layer][k]) for k in own]
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in updates[layer].values()), layer
        size = sum(jnp.sum(leaf**2) for leaf in own.values())
        assert float(sum(products)) > 0 or float(size) == 0, layer


def assert_curvature_is(after, before, path):
    one, other = after.layers[path], before.layers[path]
    for field in ("phi", "psi", "q_phi", "q_psi", "factor_weight", "theta_weight"):
        np.testing.assert_array_equal(
            getattr(one, field), getattr(other, field), err_msg=f"{path} {field}"
        )
    # The same factor is decomposed again, and Θ is transported to (nearly) the same basis.
    largest = float(jnp.max(other.theta))
    np.testing.assert_allclose(one.theta, other.theta, rtol=1e-4, atol=1e-6 * largest)


# --- statistics that are not finite -------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["a", "u"])
def test_one_layer_keeps_its_curvature_and_the_others_go_on(field, value):
    problem = Problem()
    spoilt = whole = problem.good_state()
    first = whole
    for k in range(1, 4):
        grads, updates, spoilt = problem.step(spoilt, spoil_layer("hidden", field, value))
        _, _, whole = problem.step(whole)
        assert_usable(grads, updates)
        assert_curvature_is(spoilt, first, "hidden")
        for path in ("conv", "head"):
            assert_curvature_is(spoilt, whole, path)
            assert int(spoilt.layers[path].failures) == 0
        scalars = tekfac.diagnostics(spoilt)
        assert scalars["hidden/failed_in_a_row"] == k
        assert scalars["hidden/failures"] >= k
    grads, updates, spoilt = problem.step(spoilt)
    assert_usable(grads, updates)
    assert int(tekfac.diagnostics(spoilt)["hidden/failed_in_a_row"]) == 0


def test_a_bad_first_batch_leaves_the_gradient_and_the_next_one_is_taken():
    problem = Problem(factor_interval=50, eigenbasis_interval=50, rescaling_interval=50)
    state = problem.tx.init(problem.params)
    grads, updates, state = problem.step(state, spoil_layer("conv", "a", np.nan))
    for one, other in zip(*map(jax.tree.leaves, (grads["conv"], updates["conv"])), strict=True):
        np.testing.assert_array_equal(one, other)
    grads, updates, state = problem.step(state)
    assert_usable(grads, updates)
    assert bool(state.layers["conv"].basis_valid)


def test_a_loss_that_is_no_number_for_some_steps():
    """`apply_if_finite` skips these steps; the curvature stays as it was before them."""
    problem = Problem()
    tx = optax.apply_if_finite(optax.chain(problem.tx, optax.scale(-0.1)), 5)

    @jax.jit
    def step(params, state, factor):
        def loss(params, x):
            return problem.loss(params, x) * factor

        _, grads, stats = tekfac.value_grad_and_stats(loss, problem.layers)(params, problem.x)
        updates, state = tx.update(grads, state, params, stats=stats)
        return optax.apply_updates(params, updates), state

    params, state = step(problem.params, tx.init(problem.params), 1.0)
    before = params, tekfac.curvature(state)
    for _ in range(3):
        params, state = step(params, state, jnp.nan)
    after = params, tekfac.curvature(state)
    for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_array_equal(one, other)
    params, state = step(params, state, 1.0)
    assert int(state.notfinite_count) == 0
    assert problem.loss(params, problem.x) < problem.loss(before[0], problem.x)


@pytest.mark.parametrize("rescaling", ["exact", "running"])
def test_a_gradient_that_is_no_number_is_not_hidden(rescaling):
    """If statistics are due, its layer keeps its curvature, and the others are refreshed."""
    problem = Problem(rescaling=rescaling)
    state = problem.good_state()
    grads, _, _ = problem.step(state)
    grads["head"]["kernel"] = grads["head"]["kernel"].at[0, 0].set(jnp.nan)
    stats = spoil_layer("head", "u", jnp.nan)(problem.statistics(problem.params, problem.x)[2])
    updates, after = problem.update(grads, state, stats=stats)
    assert not jnp.isfinite(updates["head"]["kernel"]).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates["conv"]))
    assert_curvature_is(after, state, "head")
    assert int(after.layers["head"].failures) > 0
    assert int(after.layers["conv"].failures) == 0
    assert np.any(np.asarray(after.layers["conv"].phi) != np.asarray(state.layers["conv"].phi))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs four devices")
def test_half_of_the_devices_see_no_numbers():
    """All devices reject the statistics of the step."""
    problem = Problem()
    tx = tekfac.scale_by_tekfac(problem.layers, axis_name="data", **EVERY_STEP)

    def step(state, x):
        _, grads, stats = tekfac.value_grad_and_stats(problem.loss, problem.layers)(
            problem.params, x
        )
        return tx.update(jax.lax.pmean(grads, "data"), state, stats=stats)

    x = randn(DEVICES, 2, 3, 3, 2)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), tx.init(problem.params))
    run = jax.pmap(step, axis_name="data")
    _, state = run(state, x)
    _, after = run(state, x.at[::2].set(jnp.nan))
    for path in problem.layers:
        assert_curvature_is(after, state, path)
        assert (after.layers[path].failures > 0).all()
    updates, after = run(after, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


# --- decompositions that fail -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 9])  # Ψ of the hidden layer; Φ of the convolution
def test_eigh_that_finds_nothing_for_one_factor(rows, monkeypatch):
    real, broken = jnp.linalg.eigh, [False]

    def eigh(factor, **options):
        bad = jax.pure_callback(lambda: np.array(broken[0]), jax.ShapeDtypeStruct((), bool))
        values, vectors = real(factor, **options)
        return values, jnp.where(bad & (factor.shape[-1] == rows), jnp.nan, vectors)

    monkeypatch.setattr(jnp.linalg, "eigh", eigh)
    problem = Problem()
    hit = {path for path, spec in problem.layers.items() if rows in (spec.in_dim, spec.out_dim)}
    state = problem.good_state()
    broken[0] = True
    grads, updates, after = problem.step(state, x=2 * problem.x)
    assert_usable(grads, updates)
    assert hit
    for path, layer in after.layers.items():
        assert int(layer.failures) == (path in hit)
        np.testing.assert_array_equal(layer.failed_in_a_row, [0, int(path in hit), 0])
        if path in hit:
            np.testing.assert_array_equal(layer.q_psi, state.layers[path].q_psi)
            np.testing.assert_array_equal(layer.q_phi, state.layers[path].q_phi)


# --- factors at the edge of what can be decomposed ----------------------------------------------


def dead(params):
    """The ReLU after the hidden layer is never active."""
    return params | {"hidden": jax.tree.map(lambda x: 0 * x - 1e3, params["hidden"])}


EDGES = {
    "zero input": lambda p, x: (p, 0 * x),
    "constant input": lambda p, x: (p, 0 * x + 1),
    "duplicate rows": lambda p, x: (p, jnp.broadcast_to(x[:1], x.shape)),
    "a batch of one": lambda p, x: (p, x[:1]),
    "input times 1e30": lambda p, x: (p, 1e30 * x),
    "input times 1e-30": lambda p, x: (p, 1e-30 * x),
    "input times 1e15, whose square overflows twice": lambda p, x: (p, 1e15 * x),
    "a dead ReLU": lambda p, x: (dead(p), x),
    "no gradient": lambda p, x: (jax.tree.map(jnp.zeros_like, p), 0 * x),
}


@pytest.mark.sampled
@every_member
@pytest.mark.parametrize("edge", EDGES)
def test_degenerate_batches(name, edge):
    """Such a batch gives a usable step, and so does an ordinary one after it."""
    problem = Problem()
    tx = SCALE_BY[name](problem.layers, **EVERY_STEP)
    update = jax.jit(tx.update)
    params, x = EDGES[edge](problem.params, problem.x)
    state = tx.init(problem.params)
    _, grads, stats = problem.statistics(params, x)
    if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)):
        pytest.fail("the case itself has no finite gradient")
    for _ in range(2):
        updates, state = update(grads, state, stats=stats)
        assert_usable(grads, updates)
    _, grads, stats = problem.statistics(problem.params, problem.x)
    updates, state = update(grads, state, stats=stats)
    assert_usable(grads, updates)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaled_statistics(scale):
    """Sums that overflow or underflow count as failures or as no curvature; no step is bad."""
    problem = Problem()
    state = problem.good_state()

    def spoil(stats):
        return stats._replace(scale=stats.scale * scale)

    for _ in range(2):
        grads, updates, state = problem.step(state, spoil)
        assert_usable(grads, updates)


# --- max_failures -------------------------------------------------------------------------------


def test_after_too_many_failures_a_layer_scales_its_gradient():
    problem = Problem(max_failures=2, damping=0.1)
    state = problem.good_state()
    spoil = spoil_layer("hidden", "u", np.nan)
    _, natural, state = problem.step(state, spoil)
    assert tekfac.check_state(state, problem.layers) == ""
    grads, updates, state = problem.step(state, spoil)
    layer = state.layers["hidden"]
    mean = float(layer.theta.sum() / layer.theta_weight / layer.theta.size)
    for k, g in grads["hidden"].items():
        np.testing.assert_allclose(updates["hidden"][k], g / (mean + 0.1), rtol=1e-5)
        assert not np.allclose(natural["hidden"][k], updates["hidden"][k], rtol=1e-2)
    for path in ("conv", "head"):
        assert_usable({path: grads[path]}, updates)
        assert not bool(state.layers[path].fallen_back)
    sentence = tekfac.check_state(state, problem.layers)
    assert "'hidden' only scales its gradient: 2 refreshes in a row failed" in sentence
    # A restored state may hold numpy arrays; under `jit` its values are not known.
    assert tekfac.check_state(jax.device_get(state), problem.layers) == sentence
    jax.jit(lambda s: tekfac.check_state(s, problem.layers) or s)(state)
    _, updates, state = problem.step(state)
    assert tekfac.check_state(state, problem.layers) == ""
    for k in natural["hidden"]:
        np.testing.assert_allclose(updates["hidden"][k], natural["hidden"][k], rtol=1e-3)


def test_without_max_failures_the_last_curvature_is_used_for_ever():
    problem = Problem(max_failures=None)
    state = problem.good_state()
    steps = [problem.step(problem.good_state(), spoil_layer("hidden", "u", np.nan))]
    for _ in range(7):
        *step, state = problem.step(state, spoil_layer("hidden", "u", np.nan))
        steps.append(step)
    assert int(state.layers["hidden"].failed_in_a_row.max()) == 7
    assert not bool(state.layers["hidden"].fallen_back)
    first, last = (steps[k][1]["hidden"] for k in (0, -1))
    for k in first:  # Θ is transported between bases that differ by rounding
        np.testing.assert_allclose(last[k], first[k], rtol=1e-3)


def test_one_kind_of_refresh_that_fails_is_not_forgiven_for_another():
    """Factors succeed at every step, decompositions fail at every second one."""
    problem = Problem(max_failures=3, eigenbasis_interval=2)
    state = problem.good_state()
    poison = state.layers["hidden"]._replace(phi=state.layers["hidden"].phi.at[1, 0].set(jnp.nan))
    state = state._replace(layers=state.layers | {"hidden": poison})
    fallen = []
    for _ in range(6):
        _, _, state = problem.step(state)
        fallen.append(bool(state.layers["hidden"].fallen_back))
    assert fallen[-1]
    assert not fallen[0]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_max_failures_out_of_range(value):
    with pytest.raises(ValueError, match=r"max_failures must be .*1 or more.* got"):
        tekfac.scale_by_tekfac(Problem().layers, max_failures=value)
