"""Layers stacked in one parameter, and layers that a scan repeats, against brute force."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tests.capturing import (
    EXACT,
    Net,
    assert_exact,
    assert_model_is_exact,
    losses_of,
    randn,
    random_params,
    relative_error,
    x64,
)
from tests.oracles import SCALE_BY


def scan(cell, axis=0, length=3, **options):
    """`nn.scan` over layers: each iteration has its own parameters."""
    return nn.scan(
        cell, variable_axes={"params": axis}, split_rngs={"params": True}, length=length, **options
    )


def repeat(cell, **options):
    """`nn.scan` with the same parameters in each iteration."""
    return nn.scan(
        cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1,
        **options,
    )  # fmt: skip


class Cell(nn.Module):
    """(carry, x) -> (carry, y): two layers, one of them without a bias."""

    @nn.compact
    def __call__(self, carry, x):
        inputs = carry if x is None else jnp.concatenate([carry, x], axis=-1)
        hidden = jnp.tanh(nn.Dense(5, use_bias=False)(inputs))
        carry = jnp.tanh(nn.Dense(3)(hidden))
        return carry, None if x is None else carry


class ConvCell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Conv(4, (3,), feature_group_count=2)(x)), None


class Nested(nn.Module):
    """A scan over layers inside a scan over layers."""

    @nn.compact
    def __call__(self, x, _):
        return scan(Cell, length=2)()(x, None)


class Recurrent(nn.Module):
    """A scan over time inside a scan over layers: time steps are positions, layers are stacked."""

    @nn.compact
    def __call__(self, x, _):
        carry = jnp.zeros_like(x[:, 0])
        return repeat(Cell)()(carry, x)[1], None


def start(x):
    return jnp.tanh(nn.Dense(3, name="start")(x))


def vmapped(layer, out_axes=0, **options):
    return nn.vmap(
        layer, variable_axes={"params": options.pop("param_axis", 0)},
        split_rngs={"params": True}, out_axes=out_axes, **options,
    )  # fmt: skip


def ensemble(x, **options):
    return vmapped(nn.Dense, in_axes=None, axis_size=4, **options)(3)(x).sum(axis=0)


def split_ensemble(x):
    """Every member has its own inputs, and the batch axis is not the first."""
    x = jnp.stack([x, 2 * x], axis=1)
    return vmapped(nn.Dense, in_axes=1, out_axes=1)(3)(x).sum(axis=1)


def recurrent(cell, **options):
    return lambda x: nn.RNN(cell(3, param_dtype=x.dtype), **options)(x)


def simple_cell(x):
    return nn.SimpleCell(3, param_dtype=x.dtype)


# name -> (function that builds the outputs, input shape, `lead` of the layers that have one)
_MODELS = {
    "scan": (lambda x: scan(Cell)()(start(x), None)[0], (5, 4), (3,)),
    "scan, remat": (lambda x: scan(nn.remat(Cell))()(start(x), None)[0], (5, 4), (3,)),
    "scan, unrolled": (lambda x: scan(Cell, unroll=3)()(start(x), None)[0], (5, 4), (3,)),
    "scan in reverse": (lambda x: scan(Cell, reverse=True)()(start(x), None)[0], (5, 4), (3,)),
    "scan of one": (lambda x: scan(Cell, length=1)()(start(x), None)[0], (5, 4), (1,)),
    "scan, other axis": (lambda x: scan(Cell, axis=1)()(start(x), None)[0], (5, 4), None),
    "scan, last axis": (lambda x: scan(Cell, axis=-1)()(start(x), None)[0], (5, 4), (3,)),
    "scan of scan": (lambda x: scan(Nested)()(start(x), None)[0], (5, 4), (3, 2)),
    "scan of jit": (lambda x: scan(nn.jit(Cell))()(start(x), None)[0], (5, 4), (3,)),
    "jit of scan": (lambda x: nn.jit(scan(Cell))()(start(x), None)[0], (5, 4), (3,)),
    "scan of groups": (lambda x: scan(ConvCell)()(x, None)[0], (5, 4, 4), (3, 2)),
    "scan over time": (lambda x: repeat(Cell)()(x[:, 0, :3], x)[1], (5, 6, 4), ()),
    "scan over time, remat": (
        lambda x: repeat(nn.remat(Cell))()(x[:, 0, :3], x)[1], (5, 6, 4), (),
    ),
    "scan over time and layers": (lambda x: scan(Recurrent)()(x, None)[0], (5, 6, 3), (3,)),
    "LSTM": (recurrent(nn.LSTMCell), (5, 6, 4), ()),
    "GRU": (recurrent(nn.GRUCell), (5, 6, 4), ()),
    "GRU in reverse": (recurrent(nn.GRUCell, reverse=True), (5, 6, 4), ()),
    "bidirectional": (
        lambda x: nn.Bidirectional(*(nn.RNN(simple_cell(x)) for _ in range(2)))(x), (5, 6, 4), (),
    ),
    "vmap": (ensemble, (5, 4), (4,)),
    "vmap, other axis": (functools.partial(ensemble, param_axis=-1), (5, 4), (4,)),
    "vmap, own inputs": (split_ensemble, (5, 4), (2,)),
    "vmap of remat": (
        lambda x: vmapped(nn.remat(nn.Dense), in_axes=None, axis_size=2)(3)(x)[1], (5, 4), (2,),
    ),
    "vmap of scan": (
        lambda x: vmapped(scan(Cell), in_axes=(0, None))()(
            jnp.stack([x, -x]), None)[0].sum(axis=0), (5, 3), None,
    ),
    "groups": (
        lambda x: nn.Conv(6, (2, 3), feature_group_count=2, strides=(2, 1))(x), (5, 5, 4, 4), (2,),
    ),
    "groups without bias": (
        lambda x: nn.Conv(6, (3,), feature_group_count=3, use_bias=False)(x), (5, 4, 6), (3,),
    ),
    "depthwise": (
        lambda x: nn.Conv(8, (3,), feature_group_count=4, kernel_dilation=2)(x), (5, 6, 4), (4,),
    ),
}  # fmt: skip


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("name", _MODELS)
def test_stacked_and_repeated_layers_are_exact(name):
    build, shape, lead = _MODELS[name]
    layers = assert_model_is_exact(Net(build), randn(*shape))
    if lead is not None:
        leads = {spec.lead for path, spec in layers.items() if path != "start"}
        assert leads == {lead}


@x64
def test_user_level_scan_over_stacked_parameters():
    """An ensemble, run by `lax.scan` or `jax.vmap` outside the model."""
    model, x = Net(lambda x: nn.Dense(2)(jnp.tanh(nn.Dense(4)(x)))), randn(5, 3)
    params = random_params(model, x)
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), params)

    def by_vmap(params, x):
        return losses_of(jax.vmap(lambda p: model.apply({"params": p}, x))(params).sum(axis=0))

    def by_scan(params, x):
        def add(total, p):
            return total + model.apply({"params": p}, x), None

        return losses_of(jax.lax.scan(add, jnp.zeros((len(x), 2), x.dtype), params)[0])

    for losses in (by_vmap, by_scan):
        layers = assert_exact(losses, stacked, x)
        assert {spec.lead for spec in layers.values()} == {(3,)}


class Stack(nn.Module):
    """Three stacked layers, or (for the oracle) the same three as separate layers."""

    together: bool

    @nn.compact
    def __call__(self, x):
        if self.together:
            return scan(Block)(name="blocks")(x, None)[0]
        for i in range(3):
            x, _ = Block(name=f"block_{i}")(x, None)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = jnp.tanh(nn.Dense(4, name="dense")(x))
        conv = nn.Conv(4, (3,), feature_group_count=2, use_bias=False, name="conv")
        return jnp.tanh(conv(x[..., None, :])[..., 0, :]), None


@pytest.mark.slow
@x64
@pytest.mark.parametrize("name", SCALE_BY)
def test_stacked_layers_train_as_separate_ones(name):
    """Updates, curvature and diagnostics are those of separate layers."""
    x = randn(9, 4)
    stack, apart = Stack(together=True), Stack(together=False)
    params = random_params(stack, x)["blocks"]
    separate = {f"block_{i}": jax.tree.map(lambda p, i=i: p[i], params) for i in range(3)}
    options = dict(factor_interval=2, eigenbasis_interval=2, rescaling_interval=1, fc_damping="own")

    def steps(model, params):
        def loss(params, x):
            return losses_of(model.apply({"params": params}, x)).mean()

        layers = tekfac.find_layers(loss, params, x)
        tx = optax.chain(SCALE_BY[name](layers, **options), optax.scale(-0.1))

        @jax.jit
        def step(params, state, x):
            _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
            updates, state = tx.update(grads, state, params, stats=stats)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for i in range(3):
            params, state = step(params, state, x + 0.1 * i)
        return params, tekfac.curvature(state), tekfac.diagnostics(state)

    together, curvature, diagnostics = steps(stack, {"blocks": params})
    expected, expected_curvature, expected_diagnostics = steps(apart, separate)
    for i in range(3):
        for layer in ("dense", "conv"):
            for key, actual in together["blocks"][layer].items():
                assert relative_error(actual[i], expected[f"block_{i}"][layer][key]) <= EXACT
            one = expected_curvature[f"block_{i}/{layer}"]
            assert curvature[f"blocks/{layer}"].theta.shape == (3, *one.theta.shape)
            for field in ("delta", "phi", "psi", "theta"):
                actual = getattr(curvature[f"blocks/{layer}"], field)[i]
                assert relative_error(actual, getattr(one, field)) <= EXACT, field
    for layer in ("dense", "conv"):
        each = [expected_diagnostics[f"block_{i}/{layer}/trace"] for i in range(3)]
        np.testing.assert_allclose(diagnostics[f"blocks/{layer}/trace"], sum(each), rtol=EXACT)


@pytest.mark.slow
def test_one_bad_member_leaves_the_others_alone():
    """A layer of the stack that gets a NaN is held back; the others are updated."""
    model, x = Net(ensemble), randn(6, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    tx = tekfac.scale_by_tekfac(layers, factor_interval=1, eigenbasis_interval=1)
    (path,) = layers
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    (capture,) = stats.layers[path]
    bad = capture._replace(u=capture.u.at[1, 0].set(jnp.nan))
    spoiled = stats._replace(layers={path: (bad,)})
    update = jax.jit(lambda stats, state: tx.update(grads, state, stats=stats))
    updates, state = update(spoiled, tx.init(params))
    good_updates, good_state = update(stats, tx.init(params))
    layer, good = state.layers[path], good_state.layers[path]
    assert layer.failures.tolist() == [0, 1, 0, 0]
    assert layer.basis_valid.tolist() == [True, False, True, True]
    for i in (0, 2, 3):
        for actual, expected in zip(layer, good, strict=True):
            np.testing.assert_array_equal(actual[i], expected[i])
    kernel, grad = (tree[path.split("/")[0]]["kernel"] for tree in (updates, grads))
    np.testing.assert_array_equal(kernel[1], grad[1])
    np.testing.assert_array_equal(kernel[0], good_updates[path.split("/")[0]]["kernel"][0])
    # The next good batch gives the bad member its basis.
    _, state = update(stats, state._replace(count=jnp.int32(7)))
    assert state.layers[path].basis_valid.all()
    assert tekfac.check_state(state, layers) == ""
