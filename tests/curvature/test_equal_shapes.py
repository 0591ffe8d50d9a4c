"""Layers of equal shape in one batched operation, as on GPU, give the numbers of single ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature import equal_shapes
from tekfac_jax._optimizer import refresh
from tests.capturing import Net, losses_of, random_params, relative_error, x64_standard

BEHIND_A_SOLVE = 1e-9


@pytest.fixture
def batched(monkeypatch):
    """As on GPU, except for LAPACK's batched calls, which may deadlock on CPU."""
    monkeypatch.setattr(equal_shapes, "on_cpu", lambda: False)


def equal_layers(x):
    """Convolutions and dense layers, two or three of each shape, and a norm of each size."""
    for k in range(3):
        x = jnp.tanh(nn.Conv(4, (2, 2), name=f"conv{k}")(x))
    x = nn.LayerNorm(name="norm0")(x).reshape(len(x), -1, 4)
    for k in range(2):
        x = jnp.tanh(nn.Dense(4, name=f"positions{k}")(x))
    x = nn.LayerNorm(name="norm1")(x) + nn.Embed(x.shape[1], 4, name="table")(
        jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    )
    return nn.Dense(3, name="head")(x.mean(axis=1))


def problem():
    model, x = Net(equal_layers), jnp.asarray(np.random.default_rng(0).normal(size=(9, 4, 3, 4)))
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x, norm="unitwise")
    return loss, layers, params, x


def steps(scale_by, number=3, **options):
    loss, layers, params, x = problem()
    tx = scale_by(layers, damping=0.1, **options)

    @jax.jit
    def step(state, x):
        _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        return tx.update(grads, state, params, stats=stats)

    state, found = tx.init(params), []
    for k in range(number):
        updates, state = step(state, (1 + 0.1 * k) * x)
        found.append(updates)
    return found, state


INTERVALS = ("factor_interval", "eigenbasis_interval", "rescaling_interval")


@pytest.mark.slow
@x64_standard
@pytest.mark.parametrize(
    ("scale_by", "intervals", "options"),
    [
        (tekfac.scale_by_tekfac, (50, 50, 50), {}),
        (tekfac.scale_by_tekfac, (1, 2, 3), {"basis_rank": 3, "eigenbasis": "subspace"}),
        (tekfac.scale_by_ekfac, (3, 2, 1), {}),
        (tekfac.scale_by_tkfac, (1, 1, 1), {"factors": "location"}),
    ],
)
def test_together_and_one_by_one(scale_by, intervals, options, monkeypatch):
    options = options | dict(zip(INTERVALS, intervals, strict=True))
    one_by_one = steps(scale_by, **options)
    monkeypatch.setattr(equal_shapes, "on_cpu", lambda: False)
    together = steps(scale_by, **options)
    for one, other in zip(*map(jax.tree.leaves, (one_by_one[0], together[0])), strict=True):
        assert relative_error(one, other) <= BEHIND_A_SOLVE
    for layer, other in zip(
        one_by_one[1].layers.values(), together[1].layers.values(), strict=True
    ):
        assert relative_error(layer.theta, other.theta) <= BEHIND_A_SOLVE
        assert int(layer.failures.sum()) == int(other.failures.sum()) == 0


def decompositions(monkeypatch, **options):
    """The shape of the factors in each call that decomposes."""
    shapes, real = [], refresh.eigenvectors

    def counted(factor, mine=None):
        shapes.append(factor.shape)
        return real(factor, mine)

    monkeypatch.setattr(refresh, "eigenvectors", counted)
    steps(tekfac.scale_by_tekfac, 1, **options)
    return shapes


@x64_standard
@pytest.mark.usefixtures("batched")
def test_equal_factors_are_one_call(monkeypatch):
    shapes = decompositions(monkeypatch)
    # Φ of three convolutions, of two dense layers and the head; Ψ of all layers with 4 outputs and
    # of the head; for the norms Φ (2×2 blocks) and Ψ (one number for each feature).
    assert sorted(shapes) == sorted(
        [(3, 17, 17), (3, 5, 5), (6, 4, 4), (3, 3), (2, 4, 2, 2), (2, 4, 1, 1)]
    )


@pytest.mark.slow
@x64_standard
@pytest.mark.usefixtures("batched")
def test_staggered_layers_are_refreshed_one_by_one(monkeypatch):
    shapes = decompositions(monkeypatch, stagger=True)
    assert {len(shape) for shape in shapes if shape[-1] > 2} == {2}


@pytest.mark.slow
@x64_standard
@pytest.mark.usefixtures("batched")
def test_one_bad_factor_leaves_the_others_of_its_size():
    loss, layers, params, x = problem()
    tx = tekfac.scale_by_tekfac(layers, factor_interval=100, eigenbasis_interval=1)
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    _, state = jax.jit(tx.update)(grads, tx.init(params), stats=stats)
    spoilt = state.layers["conv1"]._replace(phi=state.layers["conv1"].phi * jnp.nan)
    moved = state.layers["conv2"]._replace(phi=state.layers["conv2"].phi[::-1, ::-1])
    before = state._replace(layers=state.layers | {"conv1": spoilt, "conv2": moved})
    _, after = jax.jit(tx.update)(grads, before, stats=stats)
    assert int(after.layers["conv1"].failures) == 1
    np.testing.assert_array_equal(after.layers["conv1"].q_phi, before.layers["conv1"].q_phi)
    assert all(int(after.layers[p].failures.sum()) == 0 for p in layers if p != "conv1")
    assert relative_error(after.layers["conv2"].q_phi, before.layers["conv2"].q_phi) > 0.1


@pytest.mark.usefixtures("batched")
def test_by_shape_batches_only_what_is_equal():
    calls = []

    def double(x, y):
        calls.append(x.shape)
        return {"x": 2 * x, "y": y}

    ones = {k: jnp.full(shape, float(n)) for n, (k, shape) in enumerate(
        {"a": (2,), "b": (3,), "c": (2,), "d": (2,)}.items())}  # fmt: skip
    arguments: dict = {k: (x, None) for k, x in ones.items()}
    arguments["d"] = (ones["d"], ones["d"])  # of another structure
    found = equal_shapes.by_shape(double, arguments)
    assert sorted(calls) == [(2,), (2, 2), (3,)]
    assert list(found) == list(arguments)
    for key, x in ones.items():
        np.testing.assert_array_equal(found[key]["x"], 2 * x)
    assert found["a"]["y"] is None
    np.testing.assert_array_equal(found["d"]["y"], ones["d"])


def test_on_cpu_nothing_is_batched():
    calls = []
    equal_shapes.by_shape(calls.append, {k: (jnp.ones(2),) for k in "abc"})
    assert [x.shape for x in calls] == [(2,)] * 3
