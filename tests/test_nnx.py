"""nnx modules give the numbers of the linen modules with the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tekfac_jax as tekfac
import tekfac_jax.nnx
from tests.capturing import assert_sums_to_gradient, losses_of, randn, relative_error

SINGLE = 1e-5


class Linen(nn.Module):
    """Every layer type that both libraries have."""

    @nn.compact
    def __call__(self, ids, train=True):
        x = nn.Embed(7, 4, name="embed")(ids)
        x = jnp.tanh(nn.Conv(4, (3,), name="conv", feature_group_count=2, strides=2)(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = jnp.tanh(nn.ConvTranspose(4, (2,), strides=(2,), name="up")(x))
        x = jnp.tanh(nn.DenseGeneral((2, 3), name="general")(x))
        x = jnp.tanh(nn.Einsum((2, 3, 4), "btij,ijo->bto", name="einsum")(x))
        return nn.Dense(3, name="head")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3,), feature_group_count=2, strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2,), strides=(2,), rngs=rngs)
        self.general = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.einsum = nnx.Einsum("btij,ijo->bto", (2, 3, 4), (4,), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, ids):
        x = self.norm(jnp.tanh(self.conv(self.embed(ids))))
        x = jnp.tanh(self.general(jnp.tanh(self.up(x))))
        return self.head(jnp.tanh(self.einsum(x)))


def both():
    """Both models with the same weights, and a batch."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 7, (5, 6)))
    linen = Linen()
    variables = linen.init(jax.random.key(0), ids)
    model = Nnx(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    values = nnx.to_pure_dict(params)
    assert jax.tree.map(jnp.shape, values) == jax.tree.map(jnp.shape, dict(variables["params"]))
    nnx.replace_by_pure_dict(params, dict(variables["params"]))
    nnx.update(model, params)
    return linen, variables, model, ids


def nnx_loss(model, ids):
    return losses_of(model(ids)).mean()


def test_numbers_are_those_of_linen():
    linen, variables, model, ids = both()

    def linen_loss(params, batch_stats, ids):
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, updated = linen.apply(variables, ids, mutable=["batch_stats"])
        return losses_of(outputs).mean(), updated["batch_stats"]

    args = variables["params"], variables["batch_stats"], ids
    layers = tekfac.find_layers(linen_loss, *args)
    (value, batch_stats), grads, stats = jax.jit(
        tekfac.value_grad_and_stats(linen_loss, layers, has_aux=True)
    )(*args)

    nnx_layers = tekfac.nnx.find_layers(nnx_loss, model, ids)
    assert dict(nnx_layers) == dict(layers)
    assert dict(nnx_layers.uncovered) == dict(layers.uncovered)
    averages = np.array(model.norm.mean[...])
    errors = tekfac.nnx.check_capture(nnx_loss, nnx_layers, model, ids)
    assert errors == tekfac.nnx.check_capture(
        lambda model, ids: (nnx_loss(model, ids), ids), nnx_layers, model, ids, has_aux=True
    )
    assert errors.keys() == dict(layers).keys()
    assert max(errors.values()) <= 1e-4
    np.testing.assert_array_equal(model.norm.mean[...], averages)
    step = nnx.jit(tekfac.nnx.value_grad_and_stats(nnx_loss, nnx_layers))
    nnx_value, nnx_grads, nnx_stats = step(model, ids)
    assert relative_error(nnx_value, value) <= SINGLE
    for path in layers:
        for actual, expected in zip(nnx_stats.layers[path], stats.layers[path], strict=True):
            assert relative_error(actual.a, expected.a) <= SINGLE, path
            assert relative_error(actual.u, expected.u) <= SINGLE, path
    actual = nnx.to_pure_dict(nnx_grads)
    assert jax.tree.structure(actual) == jax.tree.structure(dict(grads))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # BatchNorm's averages in the model itself were updated.
    np.testing.assert_allclose(model.norm.mean[...], batch_stats["norm"]["mean"], rtol=1e-5)


@pytest.mark.slow
def test_training_is_that_of_linen():
    """nnx.Optimizer under nnx.jit against a train state."""
    linen, variables, model, ids = both()

    def linen_loss(params, ids):
        rest = {"batch_stats": variables["batch_stats"]}
        outputs, _ = linen.apply({"params": params, **rest}, ids, mutable=["batch_stats"])
        return losses_of(outputs).mean()

    options = {"factor_interval": 2, "eigenbasis_interval": 2, "rescaling_interval": 2}
    options |= {"damping": 0.1, "fallback": optax.sgd(0.05)}
    layers = tekfac.find_layers(linen_loss, variables["params"], ids)
    tx = tekfac.tekfac(0.05, layers, **options)
    state = tekfac.TrainState.create(apply_fn=linen.apply, params=variables["params"], tx=tx)

    @jax.jit
    def linen_step(state, ids):
        _, grads, stats = tekfac.value_grad_and_stats(linen_loss, layers)(state.params, ids)
        return state.apply_gradients(grads=grads, stats=stats)

    nnx_layers = tekfac.nnx.find_layers(nnx_loss, model, ids)
    optimizer = nnx.Optimizer(model, tekfac.tekfac(0.05, nnx_layers, **options), wrt=nnx.Param)

    @nnx.jit
    def nnx_step(model, optimizer, ids):
        loss, grads, stats = tekfac.nnx.value_grad_and_stats(nnx_loss, nnx_layers)(model, ids)
        optimizer.update(model, grads, stats=stats)
        return loss

    for _ in range(3):
        state = linen_step(state, ids)
        nnx_step(model, optimizer, ids)
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    curvature = tekfac.curvature(optimizer.opt_state)
    assert relative_error(curvature["head"].theta, tekfac.curvature(state)["head"].theta) <= 1e-3
    scalars = tekfac.diagnostics(optimizer.opt_state)
    inside = nnx.jit(lambda optimizer: tekfac.diagnostics(optimizer.opt_state))(optimizer)
    pure = tekfac.diagnostics(nnx.as_pure(optimizer.opt_state))
    assert scalars.keys() == tekfac.diagnostics(state.opt_state).keys() == inside.keys()
    for name, value in pure.items():
        assert isinstance(scalars[name], jax.Array)
        np.testing.assert_array_equal(scalars[name], value)
        np.testing.assert_allclose(inside[name], value, rtol=1e-6)
    assert tekfac.check_state(optimizer.opt_state, nnx_layers) == ""


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(4, 3, rngs=rngs), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=3, qkv_features=4, decode=False, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.dropout(self.attention(self.rnn(x)))
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def test_recurrence_attention_and_dropout():
    """Statistics sum to the gradient; time steps are positions; paths have list indices."""
    model, x = Recurrent(nnx.Rngs(0)), randn(5, 6, 4)
    layers = tekfac.nnx.find_layers(nnx_loss, model, x)
    assert not layers.uncovered
    assert {"layers/0", "attention/query", "rnn/cell/hf"} <= set(layers)
    assert layers["rnn/cell/hf"].positions == 6
    count = int(model.dropout.rngs.count[...])
    _, grads, stats = nnx.jit(tekfac.nnx.value_grad_and_stats(nnx_loss, layers))(model, x)
    assert int(model.dropout.rngs.count[...]) == count + 1
    assert_sums_to_gradient(layers, stats, nnx.as_pure(grads), 1e-4)


class Tied(nnx.Module):
    """A table that is both read and attended."""

    def __init__(self, rngs):
        self.table = nnx.Embed(7, 4, rngs=rngs)
        self.inner = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, ids):
        return self.table.attend(jnp.tanh(self.inner(self.table(ids))))


def test_a_tied_table_is_captured_whole():
    model, ids = Tied(nnx.Rngs(0)), jnp.asarray(np.random.default_rng(0).integers(0, 7, (5, 6)))
    layers = tekfac.nnx.find_layers(nnx_loss, model, ids)
    assert not layers.uncovered
    assert layers["table"].attended
    _, grads, stats = tekfac.nnx.value_grad_and_stats(nnx_loss, layers)(model, ids)
    assert_sums_to_gradient(layers, stats, nnx.as_pure(grads), 1e-4)


@pytest.mark.slow
def test_reduced_statistics_are_those_of_linen():
    """The basis is read from the state in nnx.Optimizer."""
    _, _, model, ids = both()
    layers = tekfac.nnx.find_layers(nnx_loss, model, ids)
    tx = tekfac.scale_by_tekfac(layers, damping=0.1, factor_interval=1, rescaling_interval=1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    raw = tekfac.nnx.value_grad_and_stats(nnx_loss, layers)
    reduced = tekfac.nnx.value_grad_and_stats(nnx_loss, layers, mode="reduced")

    @nnx.jit
    def step(model, optimizer, ids):
        _, grads, stats = raw(model, ids)
        optimizer.update(model, grads, stats=stats)
        _, grads, expected = raw(model, ids)
        _, _, stats = reduced(model, ids, opt_state=optimizer.opt_state)
        pure = nnx.as_pure(grads)
        state = nnx.as_pure(optimizer.opt_state)
        return [tx.update(pure, state, stats=s)[1] for s in (stats, expected)]

    found, expected = map(tekfac.curvature, step(model, optimizer, ids))
    for path in layers:
        for field in ("delta", "phi", "psi"):
            one, other = (getattr(side[path], field) for side in (found, expected))
            assert relative_error(one, other) <= SINGLE, (path, field)
        one, other = (side[path].theta.sum() for side in (found, expected))
        assert relative_error(one, other) <= 1e-4, path


def test_fisher_statistics_are_those_of_linen():
    linen, variables, model, ids = both()
    rest = {"batch_stats": variables["batch_stats"]}

    def linen_predict(params, ids):
        return linen.apply({"params": params, **rest}, ids, mutable=["batch_stats"])[0]

    options = {"likelihood": tekfac.Categorical()}
    key = jax.random.key(3)
    layers = tekfac.find_layers(linen_predict, variables["params"], ids)
    expected = tekfac.fisher_stats(linen_predict, layers, **options)(
        variables["params"], ids, key=key
    )
    nnx_layers = tekfac.nnx.find_layers(lambda model, ids: model(ids), model, ids)
    fn = nnx.jit(tekfac.nnx.fisher_stats(lambda model, ids: model(ids), nnx_layers, **options))
    before = model.norm.mean[...]
    found = fn(model, ids, key=key)
    assert relative_error(model.norm.mean[...], before) > 1e-3  # the model's averages were updated
    for path in layers:
        for one, other in zip(found.layers[path], expected.layers[path], strict=True):
            assert relative_error(one.u, other.u) <= 1e-4, path


class Odd(nnx.Module):
    """A plain layer, a tied one, a user-defined one, and a subclass."""

    class Sub(nnx.Linear):
        pass

    def __init__(self, rngs):
        self.plain = nnx.Linear(4, 4, rngs=rngs)
        self.tied = nnx.Embed(4, 4, rngs=rngs)
        self.sub = self.Sub(4, 4, rngs=rngs)
        self.free = nnx.Param(jnp.ones((4, 4)))

    def __call__(self, x):
        x = self.plain(x) + self.tied(jnp.asarray(x[:, 0] > 0, jnp.int32))
        return (self.sub(x) @ self.free[...]) @ self.tied.embedding[...].T


def test_what_is_not_covered_is_listed():
    model, x = Odd(nnx.Rngs(0)), randn(5, 4)
    layers = tekfac.nnx.find_layers(nnx_loss, model, x)
    assert set(layers) == {"plain"}
    reasons = dict(layers.uncovered)
    assert "it belongs to Sub, which is not a supported layer" in reasons["sub/kernel"]
    assert "tied" in reasons["tied/embedding"]
    assert "free" in reasons
    assert type(model.plain) is nnx.Linear


def test_aux_and_errors():
    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), randn(5, 4)
    layers = tekfac.nnx.find_layers(nnx_loss, model, x)

    def with_aux(model, x):
        return nnx_loss(model, x), {"name": "aux", "outputs": model(x)}

    layers_twice = tekfac.nnx.find_layers(with_aux, model, x)
    assert layers_twice["~"].positions == 2
    fn = tekfac.nnx.value_grad_and_stats(with_aux, layers, has_aux=True)
    (loss, aux), _, _ = fn(model, x)
    assert aux["name"] == "aux"
    assert loss == pytest.approx(float(nnx_loss(model, x)), rel=1e-5)
    with pytest.raises(ValueError, match="scalar"):
        tekfac.nnx.value_grad_and_stats(lambda model, x: model(x), layers)(model, x)
    wide = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'~' has changed"):
        tekfac.nnx.value_grad_and_stats(nnx_loss, layers)(wide, x)
