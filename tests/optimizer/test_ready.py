"""The default damping of the ready optimizers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tests.capturing import Net, losses_of, randn, random_params

READY = (tekfac.tekfac, tekfac.tkfac, tekfac.ekfac, tekfac.kfac)


def cnn(x):
    x = jnp.tanh(nn.Conv(3, (2, 2), name="conv")(x))
    return nn.Dense(2, name="head")(x.mean(axis=(1, 2)))


def dense(x):
    return nn.Dense(2, name="head")(x.mean(axis=(1, 2)))


def dampings(make, build, **options):
    """λ of each layer after a step, and its mean eigenvalue, tr Θ / size."""
    model, x = Net(build), randn(6, 3, 3, 2)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    tx = make(0.1, layers, fc_damping="own", trace_floor=0.0, **options)
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    found = tekfac.diagnostics(state)
    entries = {path: spec.in_dim * spec.out_dim for path, spec in layers.items()}
    return {p: (float(found[f"{p}/damping"]), float(found[f"{p}/trace"]) / n)
            for p, n in entries.items()}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", READY)
@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 0.3), ({"damping": "trace"}, 0.3), ({"damping_scale": 1.0}, 1.0)],
)
def test_a_part_of_the_mean_eigenvalue(make, options, scale):
    for damping, mean in dampings(make, cnn, **options).values():
        np.testing.assert_allclose(damping, scale * mean, rtol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("build", "options", "expected"),
    [
        (dense, {}, 1e-3),  # no convolution, so fixed
        (cnn, {"damping": 0.02}, 0.02),
        (cnn, {"damping": 0.02, "damping_scale": 0.5}, 0.01),
    ],
)
def test_a_fixed_damping_is_what_it_says(build, options, expected):
    for damping, _ in dampings(tekfac.tekfac, build, **options).values():
        np.testing.assert_allclose(damping, expected, rtol=1e-6)


def test_bare_transformations_follow_the_paper():
    def make(learning_rate, layers, **options):
        del learning_rate
        return tekfac.scale_by_tekfac(layers, **options)

    for damping, mean in dampings(make, cnn).values():
        np.testing.assert_allclose(damping, mean, rtol=1e-5)
