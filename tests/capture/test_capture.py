"""What is captured, against brute force: layer types, styles of models, calls of the loss."""

import functools
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import tekfac_jax as tekfac
from tekfac_jax._capture import check_capture
from tekfac_jax._curvature.chunks import sum_over_examples
from tests.capturing import (
    EXACT,
    HALF,
    SINGLE,
    ULPS,
    Net,
    assert_exact,
    assert_model_is_exact,
    assert_sums_to_gradient,
    losses_of,
    mlp,
    mlp_case,
    randn,
    random_params,
    relative_error,
    x64,
    x64_standard,
)

# --- layer types ---------------------------------------------------------------------------------


def general(x, **options):
    return nn.DenseGeneral(**options)(jnp.sin(x))


def self_attention(x):
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return nn.SelfAttention(num_heads=2, qkv_features=6)(x)


# name -> (function that builds the network, shape of its input, number of layers)
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
def test_positions_in_the_table_are_those_of_one_example():
    x = randn(5, 6, 4, 2)
    net = Net(lambda x: nn.Dense(2)(nn.Conv(3, (2, 2), strides=2)(x)))
    layers = assert_model_is_exact(net, x)
    assert [spec.positions for spec in layers.values()] == [6, 6]


@x64
def test_bare_layer_as_root():
    layers = assert_model_is_exact(nn.Dense(3), randn(5, 4))
    assert list(layers) == ["~"]
    layers = assert_model_is_exact(nn.Conv(3, (2, 2)), randn(5, 4, 3, 2))
    assert list(layers) == ["~"]


# --- how the model is written and called ---------------------------------------------------------


class Setup(nn.Module):
    def setup(self):
        self.blocks = [nn.Dense(4), nn.Dense(4)]
        self.head = nn.Dense(2, name="last")

    def __call__(self, x):
        return self.head(self.features(x))

    def features(self, x):
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(4)(x))


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(Block()(Block()(x)))


class RematMethod(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(Block()(Block()(x)))


def stack(block):
    return Net(lambda x: nn.Dense(2)(block()(block()(x))))


def shared(dense):
    def build(x):
        layer = dense()
        return layer(jnp.tanh(layer(x)))

    return Net(build)


class Wrapper(nn.Module):
    """Shares its child's scope: both have one path."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(3)
        nn.share_scope(self, inner)
        return jnp.tanh(inner(x))


class CheckpointedShared(nn.Module):
    """One layer, called twice, each call checkpointed by hand."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4)
        step = nn.remat(lambda layer, x: jnp.tanh(layer(x)))
        return step(layer, step(layer, x))


_STYLES = {
    "setup": Setup(),
    "jit block": stack(nn.jit(Block)),
    "remat block": stack(nn.remat(Block)),
    "jit layer": stack(lambda: nn.jit(nn.Dense)(4)),
    "remat layer": stack(lambda: nn.remat(nn.Dense)(4)),
    "remat of jit": stack(nn.remat(nn.jit(Block))),
    "jit method": JitMethod(),
    "remat method": RematMethod(),
    "jit root": nn.jit(Net)(mlp),
    "remat root": nn.remat(Net)(mlp),
    "jit root layer": nn.jit(nn.Dense)(3),
    "remat root layer": nn.remat(nn.Dense)(3),
    "shared": shared(lambda: nn.Dense(4)),
    "shared block": shared(Block),
    "shared jit layer": shared(lambda: nn.jit(nn.Dense)(4)),
    "shared jit block": shared(nn.jit(Block)),
    "shared remat block": shared(CheckpointedShared),
    "shared scope": Net(lambda x: nn.Dense(2)(Wrapper()(x))),
    "named like a method": Net(lambda x: nn.Dense(2, name="setup")(nn.Dense(3, name="attend")(x))),
}


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("name", _STYLES)
def test_styles_of_models_are_exact(name):
    model, x = _STYLES[name], randn(5, 4)
    params = random_params(model, x)

    def losses(params, x):
        return losses_of(model.apply({"params": params}, x))

    # Fills JAX's caches with traces that no interceptor has seen.
    jax.jit(losses)(params, x)
    jax.jit(jax.grad(lambda params: losses(params, x).mean()))(params)
    layers = assert_exact(losses, params, x)
    assert not layers.uncovered


_TRANSFORMS = {
    "plain": lambda apply: apply,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda apply: jax.jit(jax.checkpoint(apply)),
    "checkpoint of jit": lambda apply: jax.checkpoint(jax.jit(apply)),
    "bound": lambda apply: lambda variables, x: apply.__self__.bind(variables)(x),
}


def two_views(apply, params, x):
    return losses_of(apply({"params": params}, x)) + 2 * losses_of(
        apply({"params": params}, jnp.cos(x))
    )


@x64
@pytest.mark.parametrize("name", _TRANSFORMS)
@pytest.mark.parametrize("views", [1, 2])
def test_transformed_apply_is_exact(name, views):
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)
    apply = _TRANSFORMS[name](model.apply)

    def losses(params, x):
        if views == 2:
            return two_views(apply, params, x)
        return losses_of(apply({"params": params}, x))

    losses(params, x)  # with warm caches stale traces would be found
    layers = assert_exact(losses, params, x)
    assert not layers.uncovered


@x64
@pytest.mark.parametrize("order", ["teacher first", "student first"])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("jitted", [False, True])
def test_teacher_of_the_same_architecture_does_not_interfere(order, target, jitted):
    """Distillation: the teacher's layers have the student's paths, and its traces are cached."""
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)
    teacher = jax.tree.map(lambda p: p + 1, params)
    apply = jax.jit(model.apply) if jitted else model.apply

    def losses(params, x):
        if order == "teacher first":
            goal = apply({"params": teacher}, x)
            outputs = model.apply({"params": params}, x)
        else:
            outputs = model.apply({"params": params}, x)
            goal = apply({"params": teacher}, x)
        extra = losses_of(model.apply({"params": teacher}, outputs @ jnp.ones((3, 4)) - x))
        return losses_of(outputs - goal) + (extra if target else 0)

    losses(params, x)
    layers = assert_exact(losses, params, x)
    assert not layers.uncovered


@x64
@pytest.mark.parametrize("before", [True, False])
def test_init_inside_the_loss_does_not_interfere(before):
    """A random prior network, made on the fly."""
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)

    def prior(x):
        # Strict promotion: Flax creates float32 parameters.
        return model.init_with_output(jax.random.key(1), x.astype(jnp.float32))[0].astype(x.dtype)

    def losses(params, x):
        if before:
            return losses_of(prior(x) - model.apply({"params": params}, x))
        return losses_of(model.apply({"params": params}, x) - prior(x))

    assert not assert_exact(losses, params, x).uncovered


@x64
def test_shape_inference_inside_the_loss_does_not_interfere():
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)

    def losses(params, x):
        shape = jax.eval_shape(model.apply, {"params": params}, x)
        return losses_of(model.apply({"params": params}, x)) / shape.shape[-1]

    losses(params, x)
    assert not assert_exact(losses, params, x).uncovered


@x64
def test_two_models_in_one_tree():
    encoder, decoder, x = Net(mlp), Net(lambda x: nn.Dense(4)(nn.Dense(2)(x))), randn(5, 4)
    params = {
        "enc": random_params(encoder, x),
        "dec": random_params(decoder, randn(5, 3)),
    }

    def losses(params, x):
        code = encoder.apply({"params": params["enc"]}, x)
        return losses_of(decoder.apply({"params": params["dec"]}, code) - x)

    layers = assert_exact(losses, params, x)
    assert set(layers) == {"enc/Dense_0", "enc/Dense_1", "dec/Dense_0", "dec/Dense_1"}


@x64
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (freeze, lambda params: params),
        (lambda params: (params, {}), lambda params: params[0]),
        (lambda params: [None, params], lambda params: params[1]),
        (lambda params: {0: {"a.b": params}}, lambda params: params[0]["a.b"]),
        (lambda params: optax.LookaheadParams(params, None), lambda params: params.fast),
    ],
    ids=["FrozenDict", "tuple", "list", "odd keys", "dataclass"],
)
def test_containers_of_parameters(wrap, unwrap):
    model, x = Net(mlp), randn(5, 4)
    params = wrap(random_params(model, x))

    def losses(params, x):
        return losses_of(model.apply({"params": unwrap(params)}, x))

    layers = assert_exact(losses, params, x)
    assert len(layers) == 2


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
    """Convolutions, BatchNorm, Dropout, a head."""

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


def test_aux_need_not_be_arrays():
    """`jax.value_and_grad` does not care what aux is."""
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
    """In float16 the gradients of small losses vanish; scaled they are there, and so is Θ."""
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
        # The mask of the example, whether `x` is the batch or one of its examples.
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


def attention_case():
    def build(x):
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(3)(x)

    model, x = Net(build), randn(6, 3, 4)
    params = random_params(model, x)
    return lambda params, x: losses_of(model.apply({"params": params}, x)).mean(), params, x


@pytest.mark.sampled
@pytest.mark.parametrize("case", [mlp_case, cnn_case, attention_case])
def test_value_and_gradient_are_bit_identical(case):
    """To the last bit, as long as the statistics are not asked for.

    As outputs of the program they keep XLA from some fusions; then sums may round differently.
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
    # Of the largest entry: the gradient of attention's key bias is a zero that only rounding fills.
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
    # Without derivatives the tap is the loss itself.
    assert relative_error(tekfac.tap(loss, layers)(params, slots, x), loss(params, x)) <= SINGLE


def test_shapes_suffice_to_find_layers():
    loss, params, x = mlp_case()
    shapes = jax.eval_shape(lambda: (params, x))
    assert tekfac.find_layers(loss, *shapes) == tekfac.find_layers(loss, params, x)
    inside = []
    jax.jit(lambda params, x: inside.append(tekfac.find_layers(loss, params, x)))(params, x)
    assert inside == [tekfac.find_layers(loss, params, x)]


def test_layers_are_static_arguments():
    loss, params, x = mlp_case()
    layers, again = (tekfac.find_layers(loss, params, x) for _ in range(2))
    assert layers == again
    assert hash(layers) == hash(again)
    assert len({layers, again}) == 1
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(layers, params, x):
        traces.append(layers)
        return tekfac.value_grad_and_stats(loss, layers)(params, x)

    step(layers, params, x)
    step(again, params, x)
    assert len(traces) == 1
    other = tekfac.find_layers(loss, params, x, skip="Dense_0")
    assert other != layers
    with pytest.raises(KeyError):
        layers["nowhere"]


def test_table_lists_every_parameter():
    loss, params, x = attention_case()
    layers = tekfac.find_layers(loss, params, x, skip=lambda path: path.endswith("out"))
    text = repr(layers)
    uncovered = dict(layers.uncovered)
    for key_path, _ in jax.tree_util.tree_leaves_with_path(params):
        path = "/".join(key.key for key in key_path)
        home = path.rpartition("/")[0]
        assert (home in layers) != (path in uncovered)
        listed = path if path in uncovered else home
        assert re.search(rf"^ *{re.escape(listed)}[ :]", text, re.MULTILINE)
    assert "skipped" in uncovered["MultiHeadDotProductAttention_0/out/kernel"]
    assert "LayerNorm" in uncovered["LayerNorm_0/scale"]
    with pytest.raises(ValueError, match="skip must be"):
        tekfac.find_layers(loss, params, x, skip=3)  # pyright: ignore[reportArgumentType]


def test_the_program_carries_no_trace_of_the_trace():
    """Labels and markers would change the compilation cache's key from run to run."""
    model, x = Net(lambda x: nn.jit(Block)()(nn.relu(nn.Dense(4)(x)))), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    first, second = (
        jax.jit(tekfac.value_grad_and_stats(loss, layers)).lower(params, x).as_text()
        for _ in range(2)
    )
    assert "tekfac_trace" not in first
    assert first == second


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
    # Were the captures wrong, it would say so.
    monkeypatch.setattr(
        check_capture, "sum_over_examples", lambda *args: 2 * sum_over_examples(*args)
    )
    wrong = tekfac.check_capture(loss, layers, params, x)
    assert all(error == pytest.approx(1, rel=1e-4) for error in wrong.values())
