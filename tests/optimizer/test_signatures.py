"""One list of arguments for the family, and what `optax.inject_hyperparams` makes of it."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tekfac_jax._optimizer.options import Options
from tekfac_jax._optimizer.signatures import defaults_of

ROUNDING = (
    2e-4  # relative to the largest entry, float32, between two programs that compute the same
)

OPTIONS = {
    "basis_rank": 3, "statistics_examples": 4, "max_failures": 2, "factor_interval": 2,
    "eigenbasis_interval": 2, "rescaling_interval": 2,
}  # fmt: skip


def problem():
    model, x = nn.Dense(6), jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return jnp.mean(jnp.sum((model.apply({"params": params}, x) - 1) ** 2, axis=-1))

    return loss, params, x, tekfac.find_layers(loss, params, x)


def steps(tx, number=3):
    """Updates of some compiled steps; also `init` is compiled, as on several devices."""
    loss, params, x, layers = problem()

    @jax.jit
    def step(state, x):
        _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        return tx.update(grads, state, params, stats=stats)

    state, found = jax.jit(tx.init)(params), []
    for k in range(number):
        updates, state = step(state, (1 + 0.1 * k) * x)
        found.append(updates)
    return found, state


@pytest.mark.parametrize("name", ["tekfac", "kfac", "scale_by_tekfac", "scale_by_tkfac"])
def test_inject_hyperparams_needs_no_static_args(name):
    factory = getattr(tekfac, name)
    options = OPTIONS | {"factor_dtype": jnp.float32, "damping": 0.1}
    if not name.startswith("scale_by"):
        options["learning_rate"] = 0.1
    layers = problem()[-1]
    injected, state = steps(optax.inject_hyperparams(factory)(layers=layers, **options))
    expected, _ = steps(factory(layers=layers, **options))
    for one, other in zip(*map(jax.tree.leaves, (injected, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING * np.abs(other).max())
    static = {"basis_rank", "statistics_examples", "factor_dtype"}
    assert {"damping", *OPTIONS} - static <= set(state.hyperparams)
    assert not static & set(state.hyperparams)


def test_a_schedule_of_an_interval_is_injected():
    layers = problem()[-1]
    every = optax.piecewise_constant_schedule(1.0, {2: 2.0})
    tx = optax.inject_hyperparams(tekfac.scale_by_tekfac)(layers, factor_interval=every)
    _, state = steps(tx)
    assert state.hyperparams["factor_interval"] == 2


def test_a_mesh_is_no_schedule():
    layers = problem()[-1]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax.inject_hyperparams(tekfac.scale_by_tekfac)(layers, mesh=mesh, damping=0.1)
    injected, _ = steps(tx)
    expected, _ = steps(tekfac.scale_by_tekfac(layers, damping=0.1))
    for one, other in zip(*map(jax.tree.leaves, (injected, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING * np.abs(other).max())


def test_staggered_intervals_stay_integers():
    layers = problem()[-1]
    tx = optax.inject_hyperparams(tekfac.tekfac)(
        learning_rate=0.1, layers=layers, stagger=True, factor_interval=4
    )
    steps(tx, 1)


def test_defaults_stand_in_one_signature():
    defaults = defaults_of(tekfac.scale_by_tekfac)
    assert list(defaults) == list(Options._fields)
    assert not Options._field_defaults
    for name in ("tkfac", "ekfac", "kfac"):
        assert defaults_of(getattr(tekfac, f"scale_by_{name}")) == defaults
        assert defaults_of(getattr(tekfac, name)) == defaults_of(tekfac.tekfac)


def test_a_signature_prints_as_any_other():
    shown = str(inspect.signature(tekfac.scale_by_kfac))
    assert "factor_interval: " in shown
    assert "= 50" in shown
    assert "Static" not in shown
