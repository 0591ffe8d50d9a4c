"""Statistics and gradients that do not belong to the transformation are refused."""

import collections

import jax.numpy as jnp
import pytest

import tekfac_jax as tekfac
from tests.capturing import Net, mlp, randn, random_params, simple_case


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


def test_statistics_of_too_few_axes():
    loss, params, x, layers = simple_case()
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    (capture,) = stats.layers["Dense_0"]
    flat = capture._replace(a=jnp.zeros(()))
    stats = stats._replace(layers={**stats.layers, "Dense_0": (flat,)})
    tx = tekfac.scale_by_tekfac(layers)
    with pytest.raises(ValueError, match=r"stats of layer 'Dense_0' have inputs of shape \(\)"):
        tx.update(grads, tx.init(params), stats=stats)


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
