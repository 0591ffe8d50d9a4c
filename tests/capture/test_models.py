"""The support matrix: for every kind of model, each layer against per-example gradients."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tests.capturing import EXACT, Net, assert_exact, losses_of, randn, random_params, x64_standard
from tests.models import MODELS, SENTENCES

PAGE = (Path(__file__).parent.parent.parent / "docs" / "layers.md").read_text()


def batch_of(shape):
    if shape == SENTENCES:
        return jnp.asarray(np.random.default_rng(0).integers(0, 7, shape))
    return randn(*shape)


def case(name):
    build, shape, uncovered = MODELS[name]
    model, x = Net(build), batch_of(shape)
    params = random_params(model, x)
    if "BatchNorm" in name:
        variables = model.init(jax.random.key(0), x)

        def losses(params, x):
            variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
            return losses_of(model.apply(variables_, x, mutable=["batch_stats"])[0])

    else:

        def losses(params, x):
            return losses_of(model.apply({"params": params}, x))

    return losses, params, x, uncovered


@pytest.mark.sampled
@x64_standard
@pytest.mark.parametrize("norm", ["fallback", "unitwise"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_exact_or_listed(name, norm):
    losses, params, x, uncovered = case(name)
    if norm == "unitwise":
        if uncovered is None:
            pytest.skip("has no normalisations")
        uncovered = None
    layers = tekfac.find_layers(lambda p, x: losses(p, x).mean(), params, x, norm=norm)
    if uncovered is None:
        assert not layers.uncovered
    for path, reason in layers.uncovered:
        assert re.search(uncovered, reason), (path, reason)
    if "BatchNorm" not in name:  # which mixes the examples
        assert_exact(losses, params, x, norm=norm)
    errors = tekfac.check_capture(lambda p, x: losses(p, x).mean(), layers, params, x)
    assert max(errors.values()) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains(name):
    losses, params, x, _ = case(name)

    def loss(params, x):
        return losses(params, x).mean()

    layers = tekfac.find_layers(loss, params, x)
    # No momentum: on one full batch it overshoots the minimum and may end anywhere.
    tx = tekfac.tekfac(
        0.02, layers, momentum=0.0, factor_interval=2, eigenbasis_interval=2, rescaling_interval=2
    )

    @jax.jit
    def step(params, state, x):
        value, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        updates, state = tx.update(grads, state, params, stats=stats)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(12):
        params, state, value = step(params, state, x)
        values.append(float(value))
    assert np.isfinite(values).all()
    assert values[-1] < values[0]


@pytest.mark.parametrize("name", MODELS)
def test_page_lists_the_model(name):
    assert f"| {name} |" in PAGE
