"""However a model is written and called, its layers are found and their captures are exact."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.core import freeze

import tekfac_jax as tekfac
from tests.capturing import (
    Net,
    assert_exact,
    losses_of,
    mlp,
    mlp_case,
    randn,
    random_params,
    x64,
)

# --- how the model is written --------------------------------------------------------------------


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
    """Shares its child's scope, so both have the same path."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(3)
        nn.share_scope(self, inner)
        return jnp.tanh(inner(x))


class CheckpointedShared(nn.Module):
    """One layer called twice, each call checkpointed by hand."""

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

    # Fills JAX's caches with traces made without an interceptor.
    jax.jit(losses)(params, x)
    jax.jit(jax.grad(lambda params: losses(params, x).mean()))(params)
    layers = assert_exact(losses, params, x)
    assert not layers.uncovered


# --- how it is called ----------------------------------------------------------------------------


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

    losses(params, x)  # warms the caches, where stale traces would be found
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


# --- the trace itself ----------------------------------------------------------------------------


def test_shapes_suffice_to_find_layers():
    loss, params, x = mlp_case()
    shapes = jax.eval_shape(lambda: (params, x))
    assert tekfac.find_layers(loss, *shapes) == tekfac.find_layers(loss, params, x)
    inside = []
    jax.jit(lambda params, x: inside.append(tekfac.find_layers(loss, params, x)))(params, x)
    assert inside == [tekfac.find_layers(loss, params, x)]


def test_the_program_carries_no_trace_of_the_trace():
    """Labels or markers would change the key of the compilation cache from run to run."""
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
