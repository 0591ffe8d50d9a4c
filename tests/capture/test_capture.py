"""Captures against brute force: layer types, loss functions, and drop-in use."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tekfac_jax._capture import check_capture
from tekfac_jax._curvature.chunks import sum_over_examples
from tekfac_jax._curvature.normal_form import normal_form
from tests import oracles
from tests.capturing import (
    EXACT,
    HALF,
    SINGLE,
    ULPS,
    Net,
    assert_model_is_exact,
    assert_sums_to_gradient,
    attention_case,
    losses_of,
    mlp,
    mlp_case,
    randn,
    random_params,
    relative_error,
    x64,
    x64_standard,
)
from tests.oracles import every_case, make_case, relative


@pytest.mark.sampled(spread=True)
@x64
@every_case
def test_captures_are_per_example_gradients(name):
    case = make_case(name)
    layers = case.layers()
    grads, stats = case.grads_and_stats(layers)
    a, u = normal_form(layers[case.path], stats.layers[case.path][0], jnp.float64)
    g = jnp.einsum("nti,nto->nio", a, u) * stats.scale
    assert relative(g, oracles.per_example_matrices(name)) <= 1e-12
    assert relative(g.mean(axis=0), oracles.matrix(grads[case.path])) <= 1e-12


# --- layer types ---------------------------------------------------------------------------------


def general(x, **options):
    return nn.DenseGeneral(**options)(jnp.sin(x))


def self_attention(x):
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return nn.SelfAttention(num_heads=2, qkv_features=6)(x)


# name -> (function that builds the network, input shape, number of layers)
_DENSE = {
    "(N, F)": (mlp, (5, 4), 2),
    "(N, F), no bias": (functools.partial(mlp, use_bias=False), (5, 4), 2),
    "(N, T, F)": (mlp, (5, 3, 4), 2),
    "(N, T, F), no bias": (functools.partial(mlp, use_bias=False), (5, 3, 4), 2),
    "(N, A, B, F)": (mlp, (7, 2, 3, 4), 2),
    "one example": (mlp, (1, 4), 2),
    "general": (functools.partial(general, features=3), (5, 4), 1),
    "trailing axes": (functools.partial(general, features=3, axis=(-2, -1)), (5, 2, 3, 4), 1),
    "other axes": (functools.partial(general, features=3, axis=(1, 3)), (5, 2, 3, 4), 1),
    "axes out of order": (functools.partial(general, features=3, axis=(-1, 1)), (5, 2, 3, 4), 1),
    "middle axis": (functools.partial(general, features=3, axis=1), (5, 2, 3), 1),
    "tuple features": (functools.partial(general, features=(2, 3), axis=(-2, -1)), (5, 2, 4), 1),
    "all axes, no bias": (
        functools.partial(general, features=(2, 3), axis=(1, 2), use_bias=False), (5, 2, 4), 1,
    ),
    "attention": (lambda x: nn.MultiHeadDotProductAttention(num_heads=2)(x), (5, 3, 4), 4),
    "cross attention": (
        lambda x: nn.MultiHeadDotProductAttention(num_heads=2)(x, jnp.sin(x[:, :2])), (5, 3, 4), 4,
    ),
    "self attention": (self_attention, (5, 3, 4), 4),
    "inputs=": (lambda x: nn.Dense(3)(inputs=nn.Dense(4)(inputs=x)), (5, 4), 2),
    "sequential": (lambda x: nn.Sequential([nn.Dense(3), jnp.tanh, nn.Dense(2)])(x), (5, 4), 2),
}  # fmt: skip


def conv(features, window, **options):
    return lambda x: nn.Conv(features, window, **options)(jnp.sin(x))


def conv_transpose(features, window, **options):
    return lambda x: nn.ConvTranspose(features, window, **options)(jnp.sin(x))


def einsum(shape, equation, **options):
    return lambda x: nn.Einsum(shape, equation, **options)(jnp.sin(x))


_EINSUM = {
    "einsum heads": (einsum((4, 2, 3), "btd,dhk->bthk"), (5, 3, 4), 1),
    "einsum of heads": (einsum((2, 3, 4), "b...hk,hkd->b...d"), (5, 6, 2, 3), 1),
    "einsum in another order": (
        einsum((3, 2, 4), "bhtk, khd -> btd", use_bias=False), (5, 2, 6, 3), 1,
    ),
}  # fmt: skip
_CONV = {
    "1d stride": (conv(3, (3,), strides=2), (5, 8, 2), 1),
    "1d int window": (conv(3, 3), (5, 6, 2), 1),
    "1d causal": (conv(3, (3,), padding="CAUSAL", kernel_dilation=2), (5, 6, 2), 1),
    "1d causal stride": (conv(3, (2,), padding="CAUSAL", strides=2), (5, 7, 2), 1),
    "same": (conv(3, (3, 2)), (7, 5, 4, 2), 1),
    "same, stride, dilation": (
        conv(3, (3, 2), strides=(2, 1), kernel_dilation=(1, 2)), (5, 6, 5, 2), 1,
    ),
    "same lower": (conv(3, (2, 4), padding="SAME_LOWER", strides=(1, 2)), (5, 5, 6, 2), 1),
    "lower case": (conv(3, (2, 3), padding="valid"), (5, 4, 5, 2), 1),
    "valid, stride that leaves a rest": (
        conv(3, (2, 3), padding="VALID", strides=(3, 2)), (5, 6, 6, 2), 1,
    ),
    "circular": (conv(3, (3, 2), padding="CIRCULAR"), (5, 4, 5, 2), 1),
    "circular, stride, dilation": (
        conv(3, (3, 2), padding="CIRCULAR", strides=2, kernel_dilation=(1, 3)), (5, 4, 5, 2), 1,
    ),
    "reflect": (conv(3, (3, 2), padding="REFLECT", strides=(1, 2)), (5, 4, 5, 2), 1),
    "int padding": (conv(3, (3, 2), padding=1), (5, 4, 5, 2), 1),
    "ints padding": (conv(3, (3, 2), padding=(1, 0)), (5, 4, 5, 2), 1),
    "pairs padding": (conv(3, (3, 2), padding=((2, 0), (0, 1))), (5, 4, 5, 2), 1),
    "mixed padding": (conv(3, (3, 2), padding=(1, (0, 1)), strides=2), (5, 4, 5, 2), 1),
    "negative padding": (conv(3, (2, 2), padding=((-1, 0), (1, -1))), (5, 4, 5, 2), 1),
    "window larger than the image": (conv(3, (5, 3)), (5, 2, 3, 2), 1),
    "no bias": (conv(3, (2, 2), use_bias=False), (5, 4, 3, 2), 1),
    "one by one": (conv(3, (1, 1), strides=2), (5, 4, 3, 2), 1),
    "3d": (conv(2, (2, 1, 3), strides=(1, 2, 1)), (5, 3, 3, 4, 2), 1),
    "extra axis": (conv(3, (2, 2), strides=2), (5, 2, 4, 3, 2), 1),
    "two extra axes, circular": (conv(3, (3,), padding="CIRCULAR"), (5, 2, 3, 4, 2), 1),
    "extra axis, causal": (conv(3, (3,), padding="CAUSAL"), (5, 2, 4, 2), 1),
    "dilated input": (
        conv(3, (3, 2), input_dilation=(2, 1), padding=1, strides=(1, 2)), (5, 3, 4, 2), 1,
    ),
    "transposed": (conv_transpose(3, (3, 2), strides=(2, 1)), (5, 3, 4, 2), 1),
    "transposed, wide stride": (conv_transpose(3, (2,), strides=4), (5, 3, 2), 1),
    "transposed, valid": (
        conv_transpose(3, (3, 2), strides=(2, 3), padding="VALID"), (5, 3, 4, 2), 1,
    ),
    "transposed, dilation": (
        conv_transpose(3, (3,), strides=2, kernel_dilation=2, use_bias=False), (5, 4, 2), 1,
    ),
    "transposed, padding": (
        conv_transpose(3, (3,), strides=2, padding=((1, 2),)), (5, 4, 2), 1,
    ),
    "net": (
        lambda x: nn.Dense(3)(jnp.tanh(conv(2, (2, 2))(conv(3, (3, 3))(x))).reshape(len(x), -1)),
        (5, 3, 3, 2), 3,
    ),
}  # fmt: skip
_TYPES = {**_DENSE, **_EINSUM, **_CONV}


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("name", _TYPES)
def test_layer_types_are_exact(name):
    build, shape, count = _TYPES[name]
    layers = assert_model_is_exact(Net(build), randn(*shape))
    assert len(layers) == count


@x64
def test_bare_layer_as_root():
    layers = assert_model_is_exact(nn.Dense(3), randn(5, 4))
    assert list(layers) == ["~"]
    layers = assert_model_is_exact(nn.Conv(3, (2, 2)), randn(5, 4, 3, 2))
    assert list(layers) == ["~"]


@x64
def test_step_serves_two_batch_sizes():
    model, x = Net(mlp), randn(7, 3, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    step = jax.jit(tekfac.value_grad_and_stats(loss, layers))
    for batch in (x, x[:5], x[:, :2], x):
        _, grads, stats = step(params, batch)
        assert stats.layers["Dense_0"][0].u.shape[:2] == batch.shape[:2]
        assert_sums_to_gradient(layers, stats, grads)


# --- what is not per example ---------------------------------------------------------------------


class ResNet(nn.Module):
    """Convolutions, BatchNorm, Dropout and a head."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.3, deterministic=not train)(nn.Conv(2, (2, 2), strides=2)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def batch_norm_case():
    model, x = ResNet(), randn(5, 4, 4, 2)
    variables = {
        "params": random_params(model, x, train=False),
        "batch_stats": {"BatchNorm_0": {"mean": jnp.zeros_like(x, shape=3),
                                        "var": jnp.ones_like(x, shape=3)}},
    }  # fmt: skip
    return model, x, variables


@pytest.mark.sampled
@x64_standard
@pytest.mark.parametrize("inside", [False, True], ids=["params", "all variables"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_batch_norm_dropout_and_aux(inside, by_keyword):
    model, x, variables = batch_norm_case()

    def apply(variables, x, key, train):
        outputs, updated = model.apply(
            variables, x, train, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return losses_of(outputs).mean(), updated["batch_stats"]

    def loss(argument, x, key, train):
        rest = {"batch_stats": variables["batch_stats"]}
        return apply(argument if inside else {"params": argument, **rest}, x, key, train)

    argument = variables if inside else variables["params"]
    prefix = "params/" if inside else ""
    args, kwargs = (x, jax.random.key(3)), {}
    if by_keyword:
        kwargs["train"] = True
    else:
        args = (*args, True)
    layers = tekfac.find_layers(loss, argument, *args, **kwargs)
    assert set(layers) == {prefix + name for name in ("Conv_0", "Conv_1", "Dense_0")}
    uncovered = dict(layers.uncovered)
    assert "BatchNorm" in uncovered[prefix + "BatchNorm_0/scale"]
    assert len(uncovered) == (4 if inside else 2)
    fn = tekfac.value_grad_and_stats(loss, layers, has_aux=True)
    (value, batch_stats), grads, stats = fn(argument, *args, **kwargs)
    plain = jax.value_and_grad(loss, has_aux=True)
    (plain_value, plain_stats), plain_grads = plain(argument, *args, **kwargs)
    assert relative_error(value, plain_value) <= EXACT
    jax.tree.map(np.testing.assert_allclose, batch_stats, plain_stats)
    jax.tree.map(np.testing.assert_allclose, grads, plain_grads)
    assert_sums_to_gradient(layers, stats, grads)


@pytest.mark.slow
@x64
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


def test_aux_need_not_be_arrays():
    """As with `jax.value_and_grad`, aux may be anything."""
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        outputs = model.apply({"params": params}, x)
        return losses_of(outputs).mean(), {"name": "an epoch", "outputs": outputs, "none": None}

    layers = tekfac.find_layers(loss, params, x)
    (_, aux), _, _ = tekfac.value_grad_and_stats(loss, layers, has_aux=True)(params, x)
    assert aux["name"] == "an epoch"
    assert aux["outputs"].shape == (5, 3)


@pytest.mark.parametrize("flag", [True, np.bool_(True), None, "mean"], ids=repr)
def test_other_arguments_that_stay_static(flag):
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x, flag=None):
        scale = 2.0 if flag else 1.0
        return losses_of(model.apply({"params": params}, scale * x)).mean()

    layers = tekfac.find_layers(loss, params, x, flag)
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x, flag=flag)
    assert_sums_to_gradient(layers, stats, grads, SINGLE)


@pytest.mark.sampled
@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("half", ["compute", "params", "both", "cast in the loss"])
def test_half_precision(half, narrow):
    dtype = narrow if half in ("compute", "both") else None
    model = Net(lambda x: nn.Dense(3, dtype=dtype)(jnp.tanh(nn.Dense(4, dtype=dtype)(x))))
    x = randn(5, 3, 4)
    params = random_params(model, x)
    if half in ("params", "both"):
        params = jax.tree.map(lambda p: p.astype(narrow), params)
    if half in ("params", "cast in the loss"):
        x = x.astype(narrow)

    def loss(params, x):
        if half == "cast in the loss":
            params = jax.tree.map(lambda p: p.astype(narrow), params)
        return losses_of(model.apply({"params": params}, x).astype(jnp.float32)).mean()

    layers = tekfac.find_layers(loss, params, x)
    value, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x)
    plain_value, plain_grads = jax.jit(jax.value_and_grad(loss))(params, x)
    assert value.dtype == plain_value.dtype
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda g: g.dtype, plain_grads)
    assert len(layers) == 2
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    assert_sums_to_gradient(layers, stats, grads, HALF)


@pytest.mark.parametrize("dynamic", [False, True])
def test_loss_scale(dynamic):
    """In float16 the gradients of a small loss underflow; with a loss scale they and Θ survive."""
    model, x = Net(lambda x: nn.Dense(3, dtype=jnp.float16)(x)), randn(6, 4)
    params = random_params(model, x)

    def loss(params, x, scale):
        outputs = model.apply({"params": params}, x).astype(jnp.float32)
        return scale * 1e-7 * losses_of(outputs).mean()

    def step(params, x, scale):
        given = scale if dynamic else 2.0**20
        fn = tekfac.value_grad_and_stats(loss, layers, loss_scale=given)
        _, grads, stats = fn(params, x, scale)
        tx = tekfac.scale_by_tekfac(layers)
        _, state = tx.update(grads, tx.init(params), params, stats=stats)
        return grads, stats, tekfac.curvature(state)["Dense_0"]

    layers = tekfac.find_layers(loss, params, x, 1.0)
    scale = jnp.float32(2**20)
    grads, stats, curvature = jax.jit(step)(params, x, scale)
    assert_sums_to_gradient(layers, stats, grads, HALF, divisor=6 / scale)
    exact = Net(lambda x: nn.Dense(3)(x))
    per_example = jax.vmap(
        jax.grad(lambda p, x: 1e-7 * losses_of(exact.apply({"params": p}, x[None]))[0]), (None, 0)
    )(params, x)
    trace = sum((leaf**2).sum() for leaf in jax.tree.leaves(per_example)) / len(x)
    assert float(curvature.delta) == pytest.approx(float(trace), rel=HALF)
    assert float(curvature.theta.sum()) == pytest.approx(float(trace), rel=HALF)


def test_integer_inputs():
    model = Net(mlp)
    params = random_params(model, randn(5, 4))
    x = jnp.asarray(np.arange(20).reshape(5, 4) % 3, jnp.int32)

    def loss(params, x):
        with jax.numpy_dtype_promotion("standard"):
            return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    assert_sums_to_gradient(layers, stats, grads, SINGLE)


# --- reduction -----------------------------------------------------------------------------------


@x64
@pytest.mark.parametrize("reduction", ["mean", "sum", 2.5, "tokens"])
def test_reduction_gives_per_example_gradients_of_the_summed_loss(reduction):
    model, x = Net(mlp), randn(5, 3, 4)
    params = random_params(model, x)
    mask = jnp.asarray(np.arange(15).reshape(5, 3) % 4 > 0, jnp.float64)
    divisor = {"mean": 5.0, "sum": 1.0, "tokens": mask.sum()}.get(reduction, reduction)

    def losses(params, x):
        outputs = model.apply({"params": params}, x)
        # `x` is the whole batch, or a single example, which counts in full.
        weights = mask if len(x) == 5 else jnp.ones(x.shape[:2], x.dtype)
        return jnp.sum(weights * (outputs**2).sum(axis=-1), axis=1)

    def step(params, x, divisor):
        def loss(params, x):
            return losses(params, x).sum() / divisor

        layers = tekfac.find_layers(loss, params, x)
        given = divisor if reduction == "tokens" else reduction
        return tekfac.value_grad_and_stats(loss, layers, reduction=given)(params, x)

    layers = tekfac.find_layers(lambda params, x: losses(params, x).sum(), params, x)
    _, grads, stats = jax.jit(step)(params, x, divisor)
    summed = jax.grad(lambda params: losses(params, x).sum())(params)
    assert_sums_to_gradient(layers, stats, summed, divisor=1)
    assert_sums_to_gradient(layers, stats, grads, divisor=divisor)


# --- drop-in -------------------------------------------------------------------------------------


def cnn_case():
    model, x, variables = batch_norm_case()
    rest = {"batch_stats": variables["batch_stats"]}
    options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}

    def loss(params, x):
        return losses_of(model.apply({"params": params, **rest}, x, True, **options)[0]).mean()

    return loss, variables["params"], x


@pytest.mark.sampled
@pytest.mark.parametrize("case", [mlp_case, cnn_case, attention_case])
def test_value_and_gradient_are_bit_identical(case):
    """Bit-identical unless the program also returns the statistics.

    As outputs they prevent some of XLA's fusions, so that sums may round differently.
    """
    loss, params, x = case()
    layers = tekfac.find_layers(loss, params, x)
    fn = tekfac.value_grad_and_stats(loss, layers)
    plain_value, plain_grads = jax.jit(jax.value_and_grad(loss))(params, x)
    value, grads = jax.jit(lambda params, x: fn(params, x)[:2])(params, x)
    assert value == plain_value
    jax.tree.map(np.testing.assert_array_equal, grads, plain_grads)
    value, grads, stats = jax.jit(fn)(params, x)
    assert value == plain_value
    # Relative to the largest entry: the gradient of attention's key bias is zero up to rounding.
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(plain_grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        assert np.abs(a - b).max() <= ULPS * jnp.finfo(a.dtype).eps * largest
    assert_sums_to_gradient(layers, stats, grads, SINGLE)


@pytest.mark.slow
def test_slots_by_hand_give_the_same_captures():
    loss, params, x = attention_case()
    layers = tekfac.find_layers(loss, params, x)
    slots = tekfac.make_slots(loss, layers, params, x)
    assert all(not leaf.any() for leaf in jax.tree.leaves(slots))
    by_hand = jax.jit(jax.grad(tekfac.tap(loss, layers), argnums=(0, 1)))
    grads, captures = by_hand(params, slots, x)
    _, expected_grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x)
    jax.tree.map(np.testing.assert_array_equal, captures, stats.layers)
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
    # Called without differentiation, the tap is the loss itself.
    assert relative_error(tekfac.tap(loss, layers)(params, slots, x), loss(params, x)) <= SINGLE


def test_check_capture(monkeypatch):
    loss, params, x = mlp_case()
    layers = tekfac.find_layers(loss, params, x)
    errors = tekfac.check_capture(loss, layers, params, x)
    assert set(errors) == set(layers)
    assert max(errors.values()) < 1e-5
    at_rest = tekfac.check_capture(lambda p, x: 0 * loss(p, x), layers, params, x)
    assert max(at_rest.values()) == 0
    with_aux = tekfac.check_capture(lambda p, x: (loss(p, x), 1), layers, params, x, has_aux=True)
    assert max(with_aux.values()) < 1e-5
    # It reports captures that are wrong.
    monkeypatch.setattr(
        check_capture, "sum_over_examples", lambda *args: 2 * sum_over_examples(*args)
    )
    wrong = tekfac.check_capture(loss, layers, params, x)
    assert all(error == pytest.approx(1, rel=1e-4) for error in wrong.values())
