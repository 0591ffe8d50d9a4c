"""What is captured, against brute force; what cannot be captured is listed, never wrong."""

import collections
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import tekfac_jax as tekfac
from tekfac_jax._layers import normal_form
from tekfac_jax._pytrees import gather_matrices

EXACT = 1e-10  # relative, float64
SINGLE = 1e-4  # relative, float32
ULPS = 4  # units in the last place of the largest entry
HALF = 3e-2  # relative, bfloat16: 8 bits of mantissa, summed over a handful of terms

x64 = pytest.mark.usefixtures("x64")


@pytest.fixture
def _x64_standard(x64):
    """Float64, but with implicit promotion: Flax's normalisations need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


x64_standard = pytest.mark.usefixtures("_x64_standard")


class Net(nn.Module):
    """A network from a function that builds it."""

    build: Callable[..., Any]

    @nn.compact
    def __call__(self, x, **options):
        return self.build(x, **options)


def randn(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers in the default float dtype."""
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.result_type(float))


def random_params(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Parameters (biases too) with random values, in the default float dtype."""
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([0.6 * randn(*s.shape, seed=i) for i, s in enumerate(leaves)])


def losses_of(outputs: jax.Array) -> jax.Array:
    """A loss for each example that is neither linear nor quadratic."""
    terms = outputs**2 / 2 + jnp.sin(outputs)
    return terms.sum(axis=tuple(range(1, terms.ndim)))


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def captured_gradients(layers, stats) -> dict[str, jax.Array]:
    """G_n of each layer, [N, in[+1], out]."""
    gradients = {}
    for path, spec in layers.items():
        total: Any = 0.0
        for capture in stats.layers[path]:
            a, u = normal_form(spec, capture, stats.scale.dtype)
            total += jnp.einsum("nti,nto->nio", a, u) * stats.scale
        gradients[path] = total
    return gradients


def assert_sums_to_gradient(layers, stats, grads, tolerance=EXACT, divisor=None):
    """Σ_n G_n is the gradient of the summed loss: captures belong to the whole gradient."""
    divisor = stats.scale if divisor is None else divisor
    expected = gather_matrices(grads, layers)
    for path, g in captured_gradients(layers, stats).items():
        error = relative_error(g.sum(axis=0), expected[path] * divisor)
        assert error <= tolerance, f"{path}: {error}"


def assert_exact(losses, params, x, tolerance=EXACT):
    """Captures are the per-example gradients of `losses`; returns the layers."""

    def loss(params, x):
        return losses(params, x).mean()

    def one_gradient(params, x):
        grads = jax.grad(lambda params: losses(params, x[None])[0])(params)
        return gather_matrices(grads, layers)

    layers = tekfac.find_layers(loss, params, x)

    @jax.jit  # one program for all: most of the time goes into compilation
    def everything(params, x):
        _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        captured = captured_gradients(layers, stats)
        expected = jax.vmap(one_gradient, in_axes=(None, 0))(params, x)
        return captured, expected, gather_matrices(grads, layers)

    captured, expected, grads = everything(params, x)
    for path, g in captured.items():
        assert relative_error(g, expected[path]) <= tolerance, path
        assert relative_error(g.mean(axis=0), grads[path]) <= tolerance, path
    return layers


def assert_model_is_exact(model, x, **options):
    """The same for a model; all its kernels must be covered."""
    params = random_params(model, x, **options)

    def losses(params, x):
        return losses_of(model.apply({"params": params}, x, **options))

    layers = assert_exact(losses, params, x)
    assert not layers.uncovered
    return layers


# --- layer types ---------------------------------------------------------------------------------


def mlp(x, **options):
    x = jnp.tanh(nn.Dense(4, **options)(x))
    return nn.Dense(3, **options)(x)


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
    "net": (
        lambda x: nn.Dense(3)(jnp.tanh(conv(2, (2, 2))(conv(3, (3, 3))(x))).reshape(len(x), -1)),
        (5, 3, 3, 2), 3,
    ),
}  # fmt: skip
_TYPES = {**_DENSE, **_CONV}


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


@pytest.mark.parametrize("half", ["compute", "params", "both", "cast in the loss"])
def test_half_precision(half):
    dtype = jnp.bfloat16 if half in ("compute", "both") else None
    model = Net(lambda x: nn.Dense(3, dtype=dtype)(jnp.tanh(nn.Dense(4, dtype=dtype)(x))))
    x = randn(5, 3, 4)
    params = random_params(model, x)
    if half in ("params", "both"):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    if half in ("params", "cast in the loss"):
        x = x.astype(jnp.bfloat16)

    def loss(params, x):
        if half == "cast in the loss":
            params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return losses_of(model.apply({"params": params}, x).astype(jnp.float32)).mean()

    layers = tekfac.find_layers(loss, params, x)
    value, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x)
    plain_value, plain_grads = jax.jit(jax.value_and_grad(loss))(params, x)
    assert value.dtype == plain_value.dtype
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda g: g.dtype, plain_grads)
    assert len(layers) == 2
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    assert_sums_to_gradient(layers, stats, grads, HALF)


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


def _bits_mlp():
    model, x = Net(mlp), randn(6, 4)
    params = random_params(model, x)
    return lambda params, x: losses_of(model.apply({"params": params}, x)).mean(), params, x


def _bits_cnn():
    model, x, variables = batch_norm_case()
    rest = {"batch_stats": variables["batch_stats"]}
    options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}

    def loss(params, x):
        return losses_of(model.apply({"params": params, **rest}, x, True, **options)[0]).mean()

    return loss, variables["params"], x


def _bits_attention():
    def build(x):
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(3)(x)

    model, x = Net(build), randn(6, 3, 4)
    params = random_params(model, x)
    return lambda params, x: losses_of(model.apply({"params": params}, x)).mean(), params, x


@pytest.mark.parametrize("case", [_bits_mlp, _bits_cnn, _bits_attention])
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
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        assert np.abs(a - b).max() <= ULPS * jnp.finfo(a.dtype).eps * np.abs(b).max()
    assert_sums_to_gradient(layers, stats, grads, SINGLE)


def test_slots_by_hand_give_the_same_captures():
    loss, params, x = _bits_attention()
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
    loss, params, x = _bits_mlp()
    shapes = jax.eval_shape(lambda: (params, x))
    assert tekfac.find_layers(loss, *shapes) == tekfac.find_layers(loss, params, x)
    inside = []
    jax.jit(lambda params, x: inside.append(tekfac.find_layers(loss, params, x)))(params, x)
    assert inside == [tekfac.find_layers(loss, params, x)]


def test_layers_are_static_arguments():
    loss, params, x = _bits_mlp()
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
    loss, params, x = _bits_attention()
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


# --- Fisher statistics ---------------------------------------------------------------------------


class Fixed(NamedTuple):
    """A likelihood of the user's own: unit-variance normal, labels known in advance."""

    targets: jax.Array

    def neg_log_prob(self, outputs, targets):
        return (targets - outputs) ** 2 / 2

    def sample(self, key, outputs):
        del key
        return self.targets


# name -> (likelihood, shape of the input)
_LIKELIHOODS = {
    "categorical": (tekfac.Categorical(), (5, 4)),
    "categorical positions": (tekfac.Categorical(), (5, 2, 4)),
    "bernoulli": (tekfac.Bernoulli(), (5, 4)),
    "bernoulli positions": (tekfac.Bernoulli(), (5, 2, 4)),
    "gaussian": (tekfac.Gaussian(), (5, 4)),
    "gaussian positions": (tekfac.Gaussian(variance=0.3), (5, 2, 4)),
}


def fisher_case(shape):
    model, x = Net(mlp), randn(*shape)
    params = random_params(model, x)

    def predict(params, x):
        return model.apply({"params": params}, x)

    return predict, params, x, tekfac.find_layers(predict, params, x)


@x64
@pytest.mark.parametrize("name", _LIKELIHOODS)
def test_sampled_labels(name):
    likelihood, shape = _LIKELIHOODS[name]
    predict, params, x, layers = fisher_case(shape)
    key = jax.random.key(4)
    stats = jax.jit(tekfac.fisher_stats(predict, layers, likelihood=likelihood))(params, x, key=key)
    targets = likelihood.sample(key, predict(params, x))

    def losses(params, x):
        nll = likelihood.neg_log_prob(predict(params, x), targets)
        return nll.reshape(len(x), -1).sum(axis=1)

    expected = jax.jacrev(losses)(params, x)
    expected = jax.vmap(lambda grads: gather_matrices(grads, layers))(expected)
    for path, g in captured_gradients(layers, stats).items():
        assert relative_error(g, expected[path]) <= EXACT
    assert stats.examples == 5


def output_fisher(likelihood, outputs):
    """Hessian of the expected −log p of one example: [outputs, outputs]."""

    def at(moved):
        if isinstance(likelihood, tekfac.Categorical):
            p = jax.lax.stop_gradient(jax.nn.softmax(outputs))
            return -jnp.sum(p * jax.nn.log_softmax(moved))
        if isinstance(likelihood, tekfac.Bernoulli):
            p = jax.lax.stop_gradient(jax.nn.sigmoid(outputs))
            return -jnp.sum(p * jax.nn.log_sigmoid(moved) + (1 - p) * jax.nn.log_sigmoid(-moved))
        return jnp.sum((moved - jax.lax.stop_gradient(outputs)) ** 2) / (2 * likelihood.variance)

    return jax.hessian(at)(outputs).reshape(outputs.size, outputs.size)


@x64
@pytest.mark.parametrize("name", _LIKELIHOODS)
def test_exact_fisher_is_the_gauss_newton_block(name):
    likelihood, shape = _LIKELIHOODS[name]
    predict, params, x, layers = fisher_case(shape)
    fn = tekfac.fisher_stats(predict, layers, likelihood=likelihood, estimator="exact")
    stats = jax.jit(fn)(params, x)
    captured = captured_gradients(layers, stats)

    @jax.jit
    def jacobians(params, x):
        def one(x):
            jacobian = jax.jacrev(lambda params: predict(params, x[None]).reshape(-1))(params)
            h = output_fisher(likelihood, predict(params, x[None])[0])
            return jax.vmap(lambda grads: gather_matrices(grads, layers))(jacobian), h

        return jax.vmap(one)(x)

    jacobian, h = jacobians(params, x)
    for path, g in captured.items():
        j = jacobian[path].reshape(*h.shape[:2], -1)
        expected = jnp.einsum("nki,nkl,nlj->ij", j, h, j) / len(x)
        g = g.reshape(len(g), -1)
        assert relative_error(g.T @ g / stats.examples, expected) <= EXACT


@x64
def test_likelihood_of_the_users_own():
    predict, params, x, layers = fisher_case((5, 4))
    likelihood = Fixed(randn(5, 3, seed=9))
    stats = tekfac.fisher_stats(predict, layers, likelihood=likelihood)(
        params, x, key=jax.random.key(0)
    )
    u = (predict(params, x) - likelihood.targets) / len(x)  # Dense_1 is the last layer
    assert relative_error(stats.layers["Dense_1"][0].u, u) <= EXACT
    with pytest.raises(ValueError, match=r"fisher_root.*Fixed.*sampled"):
        tekfac.fisher_stats(predict, layers, likelihood=likelihood, estimator="exact")


def test_fisher_stats_with_aux():
    predict, params, x, layers = fisher_case((5, 4))

    def with_aux(params, x):
        return predict(params, x), {"mean": x.mean()}

    for estimator in ("sampled", "exact"):
        fn = tekfac.fisher_stats(
            with_aux, layers, likelihood=tekfac.Categorical(), estimator=estimator, has_aux=True
        )
        aux, stats = fn(params, x, key=jax.random.key(0))
        assert aux["mean"] == x.mean()
        assert set(stats.layers) == set(layers)


def test_fisher_stats_errors():
    predict, params, x, layers = fisher_case((5, 4))
    with pytest.raises(ValueError, match=r'"sampled", "exact".*got \'best\''):
        tekfac.fisher_stats(predict, layers, likelihood=tekfac.Bernoulli(), estimator="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"pass key="):
        tekfac.fisher_stats(predict, layers, likelihood=tekfac.Bernoulli())(params, x)
    with pytest.raises(ValueError, match=r"variance.*got 0"):
        tekfac.Gaussian(variance=0)
    with pytest.raises(ValueError, match="find_layers"):
        tekfac.fisher_stats(predict, params, likelihood=tekfac.Bernoulli())(
            params, x, key=jax.random.key(0)
        )


# --- transformations around a step ---------------------------------------------------------------


def training_step(axis_name=None):
    model, x = Net(mlp), randn(6, 4)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    params = random_params(model, x)
    layers = tekfac.find_layers(loss, params, x)
    tx = optax.chain(
        tekfac.scale_by_tekfac(layers, eigenbasis_interval=2, axis_name=axis_name), optax.sgd(0.1)
    )

    def step(params, opt_state, x):
        _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
        return optax.apply_updates(params, updates), opt_state

    return step, params, tx, x


@x64
def test_vmap_over_a_training_step_is_a_loop():
    step, params, tx, x = training_step()
    ensemble = [jax.tree.map(lambda p, c=c: c * p, params) for c in (1.0, 1.5)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ensemble)
    states = jax.vmap(tx.init)(together)
    for _ in range(3):
        together, states = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(together, states, x)
    for i, params in enumerate(ensemble):
        state = tx.init(params)
        for _ in range(3):
            params, state = jax.jit(step)(params, state, x)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        for key in params:
            for name in ("kernel", "bias"):
                assert relative_error(one[key][name], params[key][name]) <= EXACT


def _pmap(step):
    return jax.pmap(step, "devices", in_axes=(None, None, 0), devices=jax.devices()[:2])


def _shard_map(step, **options):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2], axis_types=auto)
    spec = jax.sharding.PartitionSpec

    def local(params, state, x):
        return jax.tree.map(lambda leaf: leaf[None], step(params, state, x[0]))

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec(), spec(), spec("devices")),
            out_specs=spec("devices"),
            **options,
        )
    )


@x64
@pytest.mark.timeout(120)
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize(
    "over_devices",
    [_pmap, functools.partial(_shard_map, check_vma=False)],
    ids=["pmap", "shard_map"],
)
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_several_devices_are_one(over_devices):
    step, params, tx, x = training_step()
    local_step, *_ = training_step("devices")
    state, local_params, local_state = tx.init(params), params, tx.init(params)
    run = over_devices(local_step)
    for _ in range(3):
        params, state = jax.jit(step)(params, state, x)
        replicas = run(local_params, local_state, x.reshape(2, 3, 4))
        local_params, local_state = jax.tree.map(lambda leaf: leaf[0], replicas)
        for leaf in jax.tree.leaves(replicas):
            np.testing.assert_array_equal(leaf[0], leaf[1])
    for key in params:
        for name in ("kernel", "bias"):
            assert relative_error(local_params[key][name], params[key][name]) <= 1e-9


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize(
    "check_vma",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.xfail(strict=True, reason="known limit, stated in the README")
        ),
    ],
)
def test_captures_under_shard_map(check_vma):
    """Each device captures its part of the batch, whether shard_map tracks replication or not."""
    loss, params, x = _bits_mlp()
    layers = tekfac.find_layers(loss, params, x)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2])
    replicated, split = (jax.sharding.PartitionSpec(*axes) for axes in ((), ("devices",)))

    def captures(params, x):
        _, _, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        return jax.tree.map(lambda c: c * stats.scale, stats.layers)

    in_specs = (replicated, split)
    local = jax.shard_map(
        captures, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=check_vma
    )
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, split))
        actual = jax.jit(local)(params, sharded)
    expected = captures(params, x)
    for path in layers:
        assert relative_error(actual[path][0].u, expected[path][0].u) <= SINGLE


# --- what cannot be captured ---------------------------------------------------------------------


class Case(NamedTuple):
    """A loss with one covered layer, "plain", and parameters that cannot be covered.

    Attributes:
        build: makes a network's outputs from its input.
        uncovered: regex on the parameter path -> regex on the reason.
        losses: (apply, params, x) -> a loss for each example.
    """

    build: Callable[[Any], Any]
    uncovered: dict[str, str]
    losses: Callable[..., Any] = lambda apply, params, x: losses_of(apply({"params": params}, x))
    shape: tuple[int, ...] = (5, 4)


def then(*layers):
    """Those layers, and an ordinary Dense layer at the end."""
    return lambda x: nn.Dense(2, name="plain")(
        functools.reduce(lambda x, f: jnp.tanh(f(x)), layers, x)
    )


def named(factory):
    """The layer under the name "odd"."""
    return lambda x: factory(name="odd")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4)(x)), None


class Subclass(nn.Dense):
    pass


class OwnLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (4, 4), x.dtype)


def scanned(x):
    blocks = nn.scan(Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return blocks(name="odd")(x, None)[0]


def vmapped(x):
    heads = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1
    )
    return heads(4, name="odd")(x[:, None] + jnp.zeros((5, 2, 1), x.dtype)).sum(axis=1)


def tied_embedding(x):
    embed = nn.Embed(4, 4, name="odd")
    return embed.attend(embed(jnp.asarray(x[:, 0] > 0, jnp.int32)) + x)


def retie(change):
    """Applies the model with "odd"'s parameters changed first."""

    def losses(apply, params, x):
        return losses_of(apply({"params": {**params, "odd": change(params["odd"])}}, x))

    return losses


def tied_in_loss(apply, params, x):
    outputs = apply({"params": params}, x)
    return losses_of(outputs) + losses_of(jnp.sin(x) @ params["odd"]["kernel"].T)


def two_paths(apply, params, x):
    return losses_of(apply({"params": {**params, "other": params["odd"]}}, x))


def own_custom_vjp(f):
    def forward(params, x):
        return jax.vjp(f, params, x)

    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(forward, lambda pull_back, g: pull_back(g))
    return wrapped


def dense(**options):
    return named(functools.partial(nn.Dense, 4, **options))


def convolution(**options):
    return named(functools.partial(nn.Conv, 4, (3,), **options))


def mask_of(shape):
    return jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % 2, jnp.result_type(float))


_KERNEL, _ANY = "odd/.*kernel", "odd/"
_UNCOVERED = {
    "grouped": Case(
        then(convolution(feature_group_count=2)), {_ANY: "grouped"}, shape=(5, 3, 4)
    ),
    "transposed": Case(
        then(named(functools.partial(nn.ConvTranspose, 4, (3,)))), {_ANY: "ConvTranspose"},
        shape=(5, 3, 4),
    ),
    "local": Case(
        then(named(functools.partial(nn.ConvLocal, 4, (2,)))), {_ANY: "ConvLocal"}, shape=(5, 3, 4)
    ),
    "dilated input": Case(
        then(convolution(input_dilation=2, padding=1)), {_ANY: "input_dilation"}, shape=(5, 3, 4)
    ),
    "masked conv": Case(
        then(lambda x: nn.Conv(4, (3,), mask=mask_of((3, 4, 4)), name="odd")(x)),
        {_ANY: "mask"}, shape=(5, 3, 4),
    ),
    "own convolution": Case(
        then(convolution(conv_general_dilated=jax.lax.conv_general_dilated)),
        {_ANY: "conv_general_dilated"}, shape=(5, 3, 4),
    ),
    "embedding": Case(
        then(lambda x: nn.Embed(3, 4, name="odd")(jnp.asarray(x[:, 0] > 0, jnp.int32))),
        {_ANY: "Embed"},
    ),
    "tied embedding": Case(then(tied_embedding), {_ANY: "Embed"}),
    "layer norm": Case(then(named(nn.LayerNorm)), {_ANY: "LayerNorm"}),
    "weight norm": Case(
        then(lambda x: nn.WeightNorm(nn.Dense(4, name="odd"), name="norm")(x)),
        {"odd/kernel$": "computed|no supported", "norm/.*scale": "WeightNorm"},
    ),
    "own dot": Case(then(dense(dot_general=jax.lax.dot_general)), {_ANY: "dot_general"}),
    "own dot class": Case(
        then(dense(dot_general_cls=lambda: jax.lax.dot_general)), {_ANY: "dot_general"}
    ),
    "own promotion": Case(
        then(dense(promote_dtype=lambda *args, dtype=None, **_: list(args))),
        {_ANY: "promote_dtype"},
    ),
    "batch dims": Case(
        then(lambda x: nn.DenseGeneral(4, batch_dims=(0,), name="odd")(x)), {_ANY: "batch_dims"}
    ),
    "no batch": Case(
        then(lambda x: x + nn.Dense(4, name="odd")(x.sum(axis=0))), {_ANY: "no batch axis"}
    ),
    "contracts the batch": Case(
        then(lambda x: x + nn.DenseGeneral(4, axis=(0, 1), name="odd")(x)), {_ANY: "no batch axis"}
    ),
    "subclass": Case(then(named(functools.partial(Subclass, 4))), {_ANY: "Subclass"}),
    "own layer": Case(then(named(OwnLayer)), {_ANY: "OwnLayer"}),
    "tied in the loss": Case(then(dense()), {_ANY: "tied"}, tied_in_loss),
    "two paths": Case(
        then(dense(), lambda x: nn.Dense(4, name="other")(x)), {"other/": "no supported layer"},
        two_paths,
    ),
    "nn.scan": Case(then(scanned), {_ANY: "scan"}),
    "nn.vmap": Case(then(vmapped), {_ANY: "vmap"}),
    "scaled": Case(
        then(dense()), {_KERNEL: "computed|no supported"},
        retie(lambda p: {**p, "kernel": 2 * p["kernel"]}),
    ),
    "transposed kernel": Case(
        then(dense()), {_KERNEL: "computed|no supported"},
        retie(lambda p: {**p, "kernel": p["kernel"].T}),
    ),
    "rounded": Case(
        then(dense()), {_KERNEL: "computed|no supported"},
        retie(lambda p: {**p, "kernel": p["kernel"].astype(jnp.int32).astype(p["bias"].dtype)}),
    ),
    "frozen": Case(
        then(dense()), {_KERNEL: "computed|no supported"}, retie(jax.lax.stop_gradient)
    ),
    "scaled bias": Case(
        then(dense()), {_KERNEL: "bias", "odd/bias": "no supported"},
        retie(lambda p: {**p, "bias": 2 * p["bias"]}),
    ),
}  # fmt: skip


@x64_standard
@pytest.mark.parametrize("name", _UNCOVERED)
def test_uncovered_layers_are_listed_with_a_reason(name):
    case = _UNCOVERED[name]
    model, x = Net(case.build), randn(*case.shape)
    params = random_params(model, x)
    if name == "two paths":
        del params["other"]

    def loss(params, x):
        return case.losses(model.apply, params, x).mean()

    layers = tekfac.find_layers(loss, params, x)
    reasons = dict(layers.uncovered)
    assert "plain" in layers
    if name == "two paths":  # further positions of one layer, and exact as such
        assert "odd" in layers
    else:
        for pattern, reason in case.uncovered.items():
            matching = {path: why for path, why in reasons.items() if re.search(pattern, path)}
            assert matching, (pattern, reasons)
            for path, why in matching.items():
                assert re.search(reason, why), (path, why)
    _, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x)
    assert_sums_to_gradient(layers, stats, grads)


def scan_over(f):
    def run(params, x):
        return jax.lax.scan(lambda c, x: (c, f(params, x[None])[0]), 0.0, x)[1]

    return run


def cond_on(f):
    return lambda params, x: jax.lax.cond(
        x.sum() > 0, f, lambda params, x: -f(params, x), params, x
    )


def map_over(f):
    return lambda params, x: jax.lax.map(lambda x: f(params, x[None])[0], x)


def loop_over(f):
    return lambda params, x: jax.lax.fori_loop(
        0, 2, lambda _, y: f(params, jnp.tile(y, (1, 2))[:, :4]), x[:, :2]
    )


# name -> (transformation of (params, x) -> outputs, what the refusal says)
_AROUND = {
    "vmap": (lambda f: lambda p, x: jax.vmap(lambda x: f(p, x[None])[0])(x), "vmap"),
    "vmap of one example": (lambda f: jax.vmap(f, in_axes=(None, 0)), "vmap|batch axis"),
    "vmap over positions": (
        lambda f: lambda p, x: jax.vmap(f, in_axes=(None, 1), out_axes=1)(p, x[:, None]), "vmap",
    ),
    "vmap of jit": (
        lambda f: lambda p, x: jax.vmap(jax.jit(lambda x: f(p, x[None])[0]))(x), "vmap",
    ),
    "scan": (scan_over, "scan"),
    "cond": (cond_on, "cond"),
    "map": (map_over, "scan"),
    "while": (loop_over, "while|scan"),
    "custom_vjp": (own_custom_vjp, "custom_vjp"),
}  # fmt: skip


@x64
@pytest.mark.parametrize("name", _AROUND)
def test_transformations_that_hide_the_layers_are_refused(name):
    transform, reason = _AROUND[name]
    model, x = Net(then(dense())), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(transform(lambda p, x: model.apply({"params": p}, x))(params, x)).mean()

    with pytest.raises(ValueError, match=reason):
        tekfac.find_layers(loss, params, x)


@x64
@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("vmap without batch", None),
        pytest.param(
            "vjp",
            "inside|derivative|differentiate",
            marks=pytest.mark.xfail(strict=True, reason="known limit, stated in the README"),
        ),
        ("gradient penalty", "tied|derivative|differentiate"),
        ("adversarial", "tied|derivative|differentiate"),
    ],
)
def test_derivatives_inside_the_loss_are_refused(name, refused):
    """And vmap over something else than the layers' inputs is exact."""
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        def outputs(x):
            return model.apply({"params": params}, x)

        if name == "vmap without batch":
            return jax.vmap(lambda w: losses_of(w * outputs(x)).mean())(x[0]).sum()
        if name == "vjp":
            return losses_of(jax.vjp(outputs, x)[0]).mean()
        gradient = jax.grad(lambda x: losses_of(outputs(x)).sum())(x)
        if name == "adversarial":
            return losses_of(outputs(x + 0.1 * jax.lax.stop_gradient(gradient))).mean()
        return (losses_of(outputs(x)) + (gradient**2).sum(axis=1)).mean()

    if refused:
        with pytest.raises(ValueError, match=refused):
            tekfac.find_layers(loss, params, x)
        return
    layers = tekfac.find_layers(loss, params, x)
    _, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x)
    assert_sums_to_gradient(layers, stats, grads)


def test_boxed_parameters_are_listed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model, x = Net(then(dense(kernel_init=init))), randn(5, 4)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    assert set(layers) == {"plain"}
    assert any("unbox" in reason for _, reason in layers.uncovered)
    layers = tekfac.find_layers(loss, nn.unbox(params), x)
    assert set(layers) == {"odd", "plain"}
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(nn.unbox(params), x)
    assert_sums_to_gradient(layers, stats, grads, SINGLE)


# --- penalties -----------------------------------------------------------------------------------


def _squares(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


# (params, coefficient) -> penalty
_PENALTIES = {
    "L2": lambda params, c: 0.1 * _squares(params),
    "coefficient": lambda params, c: c * _squares(params),
    "divided": lambda params, c: _squares(params) / (1 + c),
    "global norm": lambda params, c: c * optax.tree.norm(params) ** 2,
    "norm": lambda params, c: optax.tree.norm(params),
    "L1": lambda params, c: sum(jnp.abs(p).sum() for p in jax.tree.leaves(params)),
    "one layer": lambda params, c: c * jnp.sum(params["Dense_0"]["kernel"] ** 2),
    "kernels": lambda params, c: sum(jnp.sum(p["kernel"] ** 2) for p in params.values()),
    "by path": lambda params, c: sum(
        c * jnp.vdot(p, p)
        for path, p in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    ),
    "gram": lambda params, c: jnp.sum(
        (params["Dense_0"]["kernel"].T @ params["Dense_0"]["kernel"] - jnp.eye(4)) ** 2
    ),
    "raveled": lambda params, c: jnp.sum(
        jnp.concatenate([p.reshape(-1) for p in jax.tree.leaves(params)]) ** 2
    ),
    "jitted": lambda params, c: c * jax.jit(_squares)(params),
    "hinge": lambda params, c: jnp.maximum(_squares(params) - 1, 0),
    "towards a prior": lambda params, c: _squares(jax.tree.map(lambda p: p - 0.5, params)),
}


@x64
@pytest.mark.parametrize("name", _PENALTIES)
def test_penalties_do_not_uncover_a_layer(name):
    model, x = Net(mlp), randn(5, 4)
    params, coefficient = random_params(model, x), jnp.asarray(0.3)

    def data_loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    def loss(params, x, coefficient):
        penalty = _PENALTIES[name]
        before = penalty(params, coefficient)
        return before + data_loss(params, x) + penalty(params, 2 * coefficient)

    layers = tekfac.find_layers(loss, params, x, coefficient)
    assert not layers.uncovered
    _, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x, coefficient)
    assert_sums_to_gradient(layers, stats, jax.grad(data_loss)(params, x))
    expected = jax.grad(loss)(params, x, coefficient)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) <= EXACT


# --- errors --------------------------------------------------------------------------------------


def simple_case():
    loss, params, x = _bits_mlp()
    return loss, params, x, tekfac.find_layers(loss, params, x)


def test_loss_that_is_no_scalar():
    _, params, x, layers = simple_case()
    model = Net(mlp)

    def losses(params, x):
        return losses_of(model.apply({"params": params}, x))

    with pytest.raises(ValueError, match=r"scalar.*\(6,\).*mean"):
        tekfac.value_grad_and_stats(losses, layers)(params, x)
    with pytest.raises(ValueError, match=r"scalar.*tuple.*has_aux"):
        tekfac.value_grad_and_stats(lambda p, x: (losses(p, x).mean(), x), layers)(params, x)
    with pytest.raises(ValueError, match="pair"):
        tekfac.value_grad_and_stats(lambda p, x: losses(p, x).mean(), layers, has_aux=True)(
            params, x
        )
    with pytest.raises(ValueError, match=r"scalar.*int32"):
        tekfac.value_grad_and_stats(
            lambda p, x: losses(p, x).mean().astype(jnp.int32), layers
        )(params, x)  # fmt: skip


def test_parameters_elsewhere_than_in_argument_0():
    loss, params, x, _ = simple_case()
    with pytest.raises(ValueError, match="first argument"):
        tekfac.find_layers(lambda x, params: loss(params, x), x, params)
    with pytest.raises(ValueError, match="first argument"):
        tekfac.find_layers(lambda nothing, x: loss(params, x), {}, x)
    with pytest.raises(ValueError, match=r"first argument(.|\n)*Dense_0"):
        tekfac.find_layers(lambda nothing, x: loss(params, x), {"w": x}, x)


def test_no_supported_layer():
    model, x = Net(lambda x: nn.LayerNorm()(x)), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    with pytest.raises(ValueError, match=r"nn.Dense.*\n.*LayerNorm_0/bias: LayerNorm is not"):
        tekfac.find_layers(loss, params, x)
    loss, params, x, _ = simple_case()
    with pytest.raises(ValueError, match=r"Dense_1/kernel: skipped"):
        tekfac.find_layers(loss, params, x, skip="Dense")


def test_layers_with_other_shapes_than_used():
    loss, params, x, layers = simple_case()
    model, wide = Net(mlp), randn(6, 7)
    other = random_params(model, wide)
    with pytest.raises(ValueError, match=r"'Dense_0'.*changed.*find_layers again"):
        tekfac.value_grad_and_stats(loss, layers)(other, wide)
    no_bias = Net(functools.partial(mlp, use_bias=False))
    with pytest.raises(ValueError, match=r"'Dense_\d'.*changed.*find_layers again"):
        tekfac.value_grad_and_stats(
            lambda p, x: losses_of(no_bias.apply({"params": p}, x)).mean(), layers
        )(params, x)


def test_layer_that_is_missing_at_step_time():
    loss, params, x, layers = simple_case()
    short = Net(lambda x: nn.Dense(4)(x))

    def short_loss(params, x):
        return losses_of(short.apply({"params": params}, x)).mean()

    with pytest.raises(ValueError, match=r"'Dense_1' cannot be captured.*find_layers"):
        tekfac.value_grad_and_stats(short_loss, layers)(params, x)
    with pytest.raises(ValueError, match=r"'Dense_\d' cannot be captured.*no such parameter"):
        tekfac.value_grad_and_stats(lambda p, x: loss(p["a"], x), layers)({"a": params}, x)
    with pytest.raises(ValueError, match=r"'Dense_\d'.*tied"):
        tekfac.value_grad_and_stats(
            lambda p, x: (
                loss(p, x) + losses_of(x @ p["Dense_0"]["kernel"] @ p["Dense_1"]["kernel"]).mean()
            ),
            layers,
        )(params, x)


def test_layers_that_disagree_on_the_batch_size():
    model = Net(lambda x: nn.Dense(2, name="Dense_1")(nn.Dense(3)(x).reshape(5, 9)))
    x = randn(15, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    with pytest.raises(ValueError, match=r"Dense_0: 15.*Dense_1: 5.*skip="):
        tekfac.find_layers(loss, params, x)
    layers = tekfac.find_layers(loss, params, x, skip="Dense_0")
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    assert_sums_to_gradient(layers, stats, grads, SINGLE)


def test_one_layer_called_with_two_batch_sizes():
    """An auxiliary batch through the same layer: two sets of examples, nothing to pair them by."""
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        more = jnp.concatenate([x, x])
        return sum(losses_of(model.apply({"params": params}, v)).mean() for v in (x, more))

    with pytest.raises(ValueError, match="batch size"):
        tekfac.find_layers(loss, params, x)


@pytest.mark.parametrize(
    "reduction", ["average", None, True, 0, -1.0, float("nan"), float("inf"), np.ones(3), [2.0]]
)
def test_unknown_reduction(reduction):
    loss, _, _, layers = simple_case()
    with pytest.raises(ValueError, match="reduction must be"):
        tekfac.value_grad_and_stats(loss, layers, reduction=reduction)


def test_layers_of_a_wrong_type():
    loss, params, x, _ = simple_case()
    for factory in (tekfac.value_grad_and_stats, tekfac.tap):
        with pytest.raises(ValueError, match="find_layers, got dict"):
            factory(loss, params)
    with pytest.raises(ValueError, match="find_layers, got NoneType"):
        tekfac.make_slots(loss, None, params, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="find_layers, got list"):
        tekfac.scale_by_tekfac(list(params))  # pyright: ignore[reportArgumentType]


def test_empty_batch():
    loss, params, x, layers = simple_case()
    with pytest.raises(ValueError, match="empty"):
        tekfac.value_grad_and_stats(loss, layers)(params, x[:0])
    with pytest.raises(ValueError, match="empty"):
        tekfac.find_layers(loss, params, x[:0])


def _update(layers, grads, stats):
    tx = tekfac.scale_by_tekfac(layers)
    return tx.update(grads, tx.init(grads), stats=stats)


def test_statistics_of_other_layers():
    loss, params, x, layers = simple_case()
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    fewer = tekfac.find_layers(loss, params, x, skip="Dense_0")
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['Dense_0'\]"):
        _update(fewer, grads, stats)
    with pytest.raises(ValueError, match=r"value_grad_and_stats.*got dict"):
        _update(layers, grads, stats.layers)
    model, wide = Net(mlp), randn(6, 7)
    other = random_params(model, wide)
    wide_layers = tekfac.find_layers(loss, other, wide)
    _, _, wide_stats = tekfac.value_grad_and_stats(loss, wide_layers)(other, wide)
    with pytest.raises(ValueError, match=r"'Dense_0'.*find_layers again"):
        _update(layers, grads, wide_stats)


@pytest.mark.parametrize("masked", ["kernel", "bias"])
def test_half_masked_layers(masked):
    loss, params, x, layers = simple_case()
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    mask = {"Dense_0": {"kernel": masked != "kernel", "bias": masked != "bias"}, "Dense_1": True}
    mask["Dense_1"] = {"kernel": True, "bias": True}
    tx = optax.masked(tekfac.scale_by_tekfac(layers), mask)
    with pytest.raises(ValueError, match=rf"'Dense_0'.*its {masked} is masked.*skip"):
        tx.update(grads, tx.init(params), params, stats=stats)


def test_gradients_of_another_structure():
    loss, params, x, layers = simple_case()
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    missing = {**grads, "Dense_0": {"kernel": grads["Dense_0"]["kernel"]}}
    with pytest.raises(ValueError, match=r"no leaf 'Dense_0/bias'.*argument 0"):
        _update(layers, missing, stats)
    wrong = {**grads, "Dense_0": {**grads["Dense_0"], "kernel": jnp.zeros((9, 4))}}
    with pytest.raises(ValueError, match=r"'Dense_0/kernel' has shape \(9, 4\).*find_layers again"):
        _update(layers, wrong, stats)
    with pytest.raises(ValueError, match="no leaf"):
        _update(layers, {"params": grads}, stats)
    Pair = collections.namedtuple("Pair", ["Dense_0", "Dense_1"])
    updates, _ = _update(layers, Pair(**grads), stats)
    assert isinstance(updates, Pair)
