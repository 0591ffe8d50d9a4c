"""The optimizers under comparison: their settings, SOAP by hand, and an ablated TEKFAC."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax
from benchmarks.errors import UsageError
from benchmarks.optimizers.recipes import divide, make_optimizer
from benchmarks.optimizers.soap import soap
from tests.capture.test_errors import simple_case


def test_settings_are_divided():
    settings = {"learning_rate": 1, "damping": "trace", "momentum": None, "factor_interval": 5}
    static, traced = divide(settings)
    assert traced == {"learning_rate": 1.0}
    assert static == {"damping": "trace", "momentum": None, "factor_interval": 5}
    with pytest.raises(UsageError, match="sgd has no setting 'damping': choose from"):
        make_optimizer("sgd", None, {"damping": 1.0})


@pytest.mark.slow
def test_theta_stays_as_it_is_without_transport():
    loss, params, x, layers = simple_case()
    intervals = {"factor_interval": 1, "eigenbasis_interval": 2, "rescaling_interval": 3}
    _, grads, stats = tekfac_jax.value_grad_and_stats(loss, layers)(params, x)
    thetas = {}
    for name in ("tekfac", "tekfac-without-transport"):
        tx = make_optimizer(name, layers, intervals, {"learning_rate": 0.1})
        state, seen = tx.init(params), []
        for step in range(3):  # at the last one the basis changes, and Θ is not measured
            scaled = jax.tree.map(lambda x, step=step: x * (1 + step), stats.layers)
            _, state = tx.update(grads, state, params, stats=stats._replace(layers=scaled))
            curvature = tekfac_jax.curvature(state)["Dense_0"]
            seen.append((curvature.theta, curvature.q_phi))
        thetas[name] = seen
    (before, q_before), (moved, q_moved) = thetas["tekfac"][1:]
    assert not np.allclose(q_before, q_moved)
    assert not np.allclose(before, moved)
    np.testing.assert_allclose(jnp.sum(before), jnp.sum(moved), rtol=1e-5)
    (same_before, _), (kept, q_kept) = thetas["tekfac-without-transport"][1:]
    np.testing.assert_array_equal(before, same_before)
    np.testing.assert_array_equal(q_moved, q_kept)
    np.testing.assert_array_equal(before, kept)


def test_soap_is_adam_in_the_eigenbasis():
    """Against the same steps written out with numpy, and Adam where nothing is rotated."""
    rng = np.random.default_rng(0)
    grads = [{"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)} for _ in range(4)]
    tx = soap(0.1, interval=100)
    state = tx.init(grads[0])
    update: Any
    update, state = tx.update(grads[0], state)
    np.testing.assert_array_equal(update["w"], 0)
    left, right = (np.linalg.eigh(f)[1][:, ::-1] for f in
                   (grads[0]["w"] @ grads[0]["w"].T, grads[0]["w"].T @ grads[0]["w"]))  # fmt: skip
    mean, square = 0.0, 0.0
    for k, g in enumerate(grads[1:], start=1):
        update, state = tx.update(g, state)
        g = np.asarray(g["w"])
        mean = 0.95 * mean + 0.05 * g
        square = 0.95 * square + 0.05 * (left.T @ g @ right) ** 2
        direction = left.T @ mean @ right / (1 - 0.95**k)
        direction = direction / (np.sqrt(square / (1 - 0.95**k)) + 1e-8)
        np.testing.assert_allclose(update["w"], -0.1 * left @ direction @ right.T, rtol=2e-3)
        if k == 1:  # as Adam's first: a sign in each direction
            np.testing.assert_allclose(np.abs(direction), 1, rtol=1e-3)
