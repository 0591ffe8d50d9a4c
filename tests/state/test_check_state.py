"""`check_state` says in one sentence what is wrong with a state."""

import jax
import jax.numpy as jnp
import optax
import pytest

import tekfac_jax as tekfac
from tests.capturing import simple_case
from tests.conforming import case, make, standard_promotion


@standard_promotion
def test_check_state_is_a_sentence():
    layers, params = case().layers, case().params
    x = jnp.ones((6, 3), jnp.float32)
    state = optax.chain(make("scale_by_tekfac")).init(params)
    assert tekfac.check_state(state, layers) == ""
    fewer = tekfac.find_layers(case().loss, params, x, skip="first")
    assert tekfac.check_state(state, fewer) == (
        "The state lacks layers [] and has ['first'], which the network does not have."
    )
    assert "lacks layers ['first']" in tekfac.check_state(
        tekfac.scale_by_tekfac(fewer).init(params), layers
    )
    wide = jnp.ones((6, 5), jnp.float32)
    other = case().model.init(jax.random.key(0), wide)["params"]
    sentence = tekfac.check_state(state, tekfac.find_layers(case().loss, other, wide))
    assert sentence == (
        "Layer 'first' has dimensions (in, out) = (4, 4) in the state and (6, 4) in the network."
    )
    functions = (
        tekfac.curvature, tekfac.stats_due, tekfac.memory_usage, tekfac.diagnostics,
        lambda state: tekfac.check_state(state, layers),
    )  # fmt: skip
    for function in functions:
        with pytest.raises(ValueError, match=r"no state of scale_by_tekfac.*tx\.init"):
            function(optax.sgd(0.1).init(params))


def test_steps_without_statistics():
    loss, params, x, layers = simple_case()
    tx = tekfac.tekfac(0.1, layers)
    state = tx.init(params)
    assert tekfac.check_state(state, layers) == ""
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    for _ in range(2):
        _, state = tx.update(grads, state, params)
    assert tekfac.check_state(state, layers).startswith(
        "No usable statistics have arrived so far (step 2)"
    )
    jax.jit(lambda state: tekfac.check_state(state, layers) or state)(state)
    _, state = tx.update(grads, state, params, stats=stats)
    assert tekfac.check_state(state, layers) == ""
