"""Shared by tests of every public transform: all of them on one small network.

Tests that use this module are marked with its `standard_promotion`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tekfac_jax._state import recognise

LEARNING_RATE = 0.05
ROUNDING = 2e-4  # relative, float32, between two programs for the same computation
STEPS = 3

SCALE_BY = {
    "scale_by_tekfac": tekfac.scale_by_tekfac,
    "scale_by_tkfac": tekfac.scale_by_tkfac,
    "scale_by_ekfac": tekfac.scale_by_ekfac,
    "scale_by_kfac": tekfac.scale_by_kfac,
}
READY = {
    name: functools.partial(getattr(tekfac, name), LEARNING_RATE)
    for name in ("tekfac", "tkfac", "ekfac", "kfac")
}
FACTORIES = {**SCALE_BY, **READY}
OPTIONS = {
    "factor_interval": 2,
    "eigenbasis_interval": 1,
    "rescaling_interval": 2,
    "damping": 0.1,  # so that rounding errors stay small in float32
}
INTERVALS = tuple(name for name in OPTIONS if name.endswith("_interval"))
FACTORS = ("phi", "psi", "q_phi", "q_psi")

every_transform = pytest.mark.parametrize("name", FACTORIES)
every_scale_by = pytest.mark.parametrize("name", SCALE_BY)
standard_promotion = pytest.mark.usefixtures("standard_promotion")


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(2, name="last", use_bias=False)(jnp.tanh(x))


class Case:
    """A network, its layers, and the gradient and statistics of one batch for each step."""

    def __init__(self):
        self.model = Model()
        xs = jax.random.normal(jax.random.key(0), (8, 6, 3), jnp.float32)
        self.params = self.model.init(jax.random.key(1), xs[0])["params"]
        self.layers = tekfac.find_layers(self.loss, self.params, xs[0])
        step = jax.jit(tekfac.value_grad_and_stats(self.loss, self.layers))
        self.batches = [step(self.params, x)[1:] for x in xs]

    def loss(self, params, x):
        outputs = self.model.apply({"params": params}, x)
        return jnp.mean(jnp.sum((outputs - 1) ** 2, axis=-1))


@functools.cache
def case() -> Case:
    return Case()


def make(name, **options):
    return FACTORIES[name](case().layers, **{**OPTIONS, **options})


class Runner:
    """A transform whose update is compiled once; `traces` counts."""

    def __init__(self, tx):
        self.init, self.traces = tx.init, 0

        def update(grads, state, params, stats):
            self.traces += 1
            return tx.update(grads, state, params, stats=stats, loss=1.0, unknown=None)

        self.update = jax.jit(update)

    def run(self, batches, state=None):
        """The updates of each step, and the last state."""
        params = case().params
        state = self.init(params) if state is None else state
        all_updates = []
        for grads, stats in batches:
            updates, state = self.update(grads, state, params, stats)
            all_updates.append(updates)
        return all_updates, state


@functools.cache
def runner(name, **options) -> Runner:
    return Runner(make(name, **options))


def first_batches(steps=STEPS):
    return case().batches[:steps]


@functools.cache
def reference(name):
    return runner(name).run(first_batches())


def assert_close(actual, expected):
    def check(a, b):
        scale = float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING * scale)

    jax.tree.map(check, actual, expected)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def our_state(opt_state) -> tekfac.ScaleByTekfacState:
    (found,) = recognise.search(opt_state, tekfac.ScaleByTekfacState)
    return found
