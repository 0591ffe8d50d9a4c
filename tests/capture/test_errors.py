"""Bad input raises an error that names the value, what is permitted and the remedy."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tekfac_jax as tekfac
from tekfac_jax import nnx as tekfac_nnx
from tests.capturing import (
    SINGLE,
    Net,
    assert_sums_to_gradient,
    losses_of,
    mlp,
    randn,
    random_params,
    simple_case,
)


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


@pytest.mark.parametrize("dtype", [jnp.int32, bool])
def test_parameter_that_cannot_be_differentiated(dtype):
    loss, params, x, _ = simple_case()
    bias = params["Dense_0"]["bias"].astype(dtype)
    with_counter = {**params, "counter": jnp.zeros((), dtype)}
    params = {**params, "Dense_0": {**params["Dense_0"], "bias": bias}}
    for wrong, name in [(params, "Dense_0/bias"), (with_counter, "counter")]:
        layers = tekfac.find_layers(loss, wrong, x)
        with pytest.raises(ValueError, match=rf"leaf '{name}' has dtype {jnp.dtype(dtype)}; keep"):
            tekfac.value_grad_and_stats(loss, layers)(wrong, x)


def test_option_of_another_function_in_find_layers():
    loss, params, x, _ = simple_case()
    with pytest.raises(ValueError, match="has_aux= is an option of value_grad_and_stats; find_lay"):
        tekfac.find_layers(loss, params, x, has_aux=True)

    def with_mode(params, x, mode):
        return loss(params, x) if mode == "train" else 0.0

    assert tekfac.find_layers(with_mode, params, x, mode="train")
    assert tekfac.find_layers(lambda params, x, **options: loss(params, x), params, x, mode=1)


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

    with pytest.raises(
        ValueError, match=r"no dense layer.*\n.*LayerNorm_0/bias: LayerNorm, left to the fallback"
    ):
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


def test_layer_that_find_layers_did_not_see():
    """Otherwise it would silently have no curvature."""
    model, x = Net(lambda x, late=True: nn.Dense(3, name="late")(nn.Dense(4, name="early")(x))
                   if late else nn.Dense(4, name="early")(x)), randn(5, 3)  # fmt: skip
    params = random_params(model, x)

    def loss(params, x, late):
        return losses_of(model.apply({"params": params}, x, late=late)).mean()

    layers = tekfac.find_layers(loss, params, x, False)
    assert set(layers) == {"early"}
    with pytest.raises(ValueError, match=r"'late' is called here, but was not.*call find_layers"):
        tekfac.value_grad_and_stats(loss, layers)(params, x, True)
    skipped = tekfac.find_layers(loss, params, x, True, skip="late")
    tekfac.value_grad_and_stats(loss, skipped)(params, x, True)


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
    """An auxiliary batch through the same layer: its examples cannot be paired with the others."""
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


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), None, "dynamic"])
def test_loss_scale_out_of_range(scale):
    loss, _, _, layers = simple_case()
    with pytest.raises(ValueError, match=rf"loss_scale must be .*\(0, inf\).*{scale}"):
        tekfac.value_grad_and_stats(loss, layers, loss_scale=scale)


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


# --- common mistakes -----------------------------------------------------------------------------


def test_what_has_changed_of_a_layer():
    loss, _, _, layers = simple_case()
    wide = randn(6, 7)
    changed = r"find_layers: kernel_shape was \(4, \d\) and is \(7, \d\)\. Call find_layers again"
    with pytest.raises(ValueError, match=changed):
        tekfac.value_grad_and_stats(loss, layers)(random_params(Net(mlp), wide), wide)


def test_parameters_that_are_new():
    """Otherwise they would go to the fallback without being listed."""
    loss, params, x, layers = simple_case()
    scaled = {**params, "scale": jnp.ones(())}

    def scaled_loss(params, x):
        return loss({k: v for k, v in params.items() if k != "scale"}, x) * params["scale"]

    with pytest.raises(ValueError, match=r"that find_layers did not see: scale\. Call find_"):
        tekfac.value_grad_and_stats(scaled_loss, layers)(scaled, x)
    one = dataclasses.replace(layers, specs=layers.specs[:1], uncovered=(("Dense_1/bias", ""),))
    with pytest.raises(ValueError, match=r"find_layers did not see: Dense_1/kernel\. Call"):
        tekfac.value_grad_and_stats(loss, one)(params, x)
    *_, stats = tekfac.value_grad_and_stats(loss, tekfac.Layers(layers.specs[:1]))(params, x)
    assert list(stats.layers) == ["Dense_0"]  # chosen by hand, so nothing is missing
    unseen = (("Dense_1/kernel", "no supported layer was found that owns it"),)
    with pytest.raises(ValueError, match="'Dense_1' is called here, but was not called when"):
        tekfac.value_grad_and_stats(loss, tekfac.Layers(layers.specs[:1], unseen))(params, x)


def test_skip_that_leaves_nothing_out():
    loss, params, x, _ = simple_case()
    with pytest.raises(ValueError, match=r"skip='Dence' matches none of the layers: Dense_0, Dens"):
        tekfac.find_layers(loss, params, x, skip="Dence")
    with pytest.raises(ValueError, match=r"skip must be a regular expression, got '\*head'"):
        tekfac.find_layers(loss, params, x, skip="*head")
    assert list(tekfac.find_layers(loss, params, x, skip="_0$")) == ["Dense_1"]
    assert len(tekfac.find_layers(loss, params, x, skip=lambda path: False)) == 2


def test_all_variables_in_place_of_the_parameters():
    def norm(x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x)))

    model, x = Net(norm), randn(5, 4)
    variables = model.init(jax.random.key(0), x)

    def loss(variables, x):
        return losses_of(model.apply(variables, x, mutable=["batch_stats"])[0]).mean()

    reasons = dict(tekfac.find_layers(loss, variables, x).uncovered)
    reason = reasons["batch_stats/BatchNorm_0/mean"]
    assert reason == "not a parameter: pass variables['params'] alone as argument 0"


def test_modules_and_parameters_where_the_other_belongs():
    loss, params, x, _ = simple_case()
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"argument 0 is a module of flax.nnx: use .*tekfac_jax.nnx"
    ):
        tekfac.find_layers(lambda model, x: model(x).sum(), model, x)
    with pytest.raises(ValueError, match=r"must be an nnx.Module with an nnx.Param, got dict; for"):
        tekfac_nnx.find_layers(loss, params, x)
    with pytest.raises(ValueError, match=r"must be an nnx.Module with an nnx.Param, got State;"):
        tekfac_nnx.find_layers(lambda model, x: model(x).sum(), nnx.state(model), x)
