"""The gradient matrix of a layer: kernel and bias are one, and cannot be masked separately."""

import optax
import pytest

import tekfac_jax as tekfac
from tests.capturing import simple_case


@pytest.mark.parametrize("masked", ["kernel", "bias"])
def test_half_masked_layers(masked):
    loss, params, x, layers = simple_case()
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    mask = {"Dense_0": {"kernel": masked != "kernel", "bias": masked != "bias"}, "Dense_1": True}
    mask["Dense_1"] = {"kernel": True, "bias": True}
    tx = optax.masked(tekfac.scale_by_tekfac(layers), mask)
    with pytest.raises(ValueError, match=rf"'Dense_0'.*its {masked} is masked.*skip"):
        tx.update(grads, tx.init(params), params, stats=stats)
