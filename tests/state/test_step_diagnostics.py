"""`step_diagnostics` against numpy on each layer's whole vectors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tekfac_jax as tekfac
import tekfac_jax.nnx


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4, use_bias=False)(x)))


MODEL, X = Net(), jax.random.normal(jax.random.key(0), (6, 5))
PARAMS = MODEL.init(jax.random.key(1), X)["params"]


def loss_fn(params, x):
    return jnp.square(MODEL.apply({"params": params}, x)).mean()


LAYERS = tekfac.find_layers(loss_fn, PARAMS, X)
GRADS = jax.grad(loss_fn)(PARAMS, X)


def random_like(tree, seed):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def vector(tree):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def degrees(x, y):
    return np.degrees(np.arccos(x @ y / (np.linalg.norm(x) * np.linalg.norm(y))))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_ratio_and_angle_of_whole_vectors(scale):
    """The squares of the extreme scales are out of float32's range."""
    updates = jax.tree.map(lambda x: scale * x, random_like(PARAMS, 2))
    found = jax.jit(functools.partial(tekfac.step_diagnostics, LAYERS))(PARAMS, GRADS, updates)
    assert set(found) == {f"Dense_{i}/{name}" for i in (0, 1) for name in ("update_ratio", "angle")}
    for path in LAYERS:
        step, weight, grad = (vector(tree[path]) for tree in (updates, PARAMS, GRADS))
        ratio = np.linalg.norm(step) / np.linalg.norm(weight)
        np.testing.assert_allclose(found[f"{path}/update_ratio"], ratio, rtol=1e-5)
        np.testing.assert_allclose(found[f"{path}/angle"], degrees(step, -grad), rtol=1e-5)
        assert found[f"{path}/angle"].shape == ()


def test_gradient_descent_has_no_angle_and_ascent_turns_around():
    for sign, expected in ((-0.1, 0), (0.1, 180)):
        updates = jax.tree.map(lambda g, sign=sign: sign * g, GRADS)
        found = tekfac.step_diagnostics(LAYERS, PARAMS, GRADS, updates)
        # A float32 arc cosine would be off by hundredths of a degree.
        np.testing.assert_allclose(found["Dense_0/angle"], expected, atol=1e-4)


@pytest.mark.slow
def test_preconditioned_gradient_goes_downhill():
    _, grads, stats = tekfac.value_grad_and_stats(loss_fn, LAYERS)(PARAMS, X)
    tx = tekfac.tekfac(0.1, LAYERS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    found = tekfac.step_diagnostics(LAYERS, PARAMS, grads, updates)
    for path in LAYERS:
        assert 1 < found[f"{path}/angle"] < 90
        assert 0 < found[f"{path}/update_ratio"] < 1


def test_what_has_no_angle_or_ratio():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    still = tekfac.step_diagnostics(LAYERS, PARAMS, GRADS, zeros)
    assert still["Dense_0/update_ratio"] == 0
    assert jnp.isnan(still["Dense_0/angle"])
    assert jnp.isnan(tekfac.step_diagnostics(LAYERS, PARAMS, zeros, GRADS)["Dense_0/angle"])
    assert jnp.isinf(tekfac.step_diagnostics(LAYERS, zeros, GRADS, GRADS)["Dense_0/update_ratio"])
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), GRADS)
    found = tekfac.step_diagnostics(LAYERS, PARAMS, GRADS, broken)
    assert all(map(jnp.isnan, found.values()))


def test_half_precision_is_compared_in_single():
    params, grads = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), t) for t in (PARAMS, GRADS))
    updates = jax.tree.map(lambda g: -g, grads)
    found = tekfac.step_diagnostics(LAYERS, params, grads, updates)
    assert found["Dense_0/angle"].dtype == jnp.float32
    np.testing.assert_allclose(found["Dense_0/angle"], 0, atol=1e-4)


@pytest.mark.slow
def test_stacked_layers_show_the_largest():
    ensemble = nn.vmap(
        nn.Dense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True},
        axis_size=3,
    )(2)  # fmt: skip
    params = ensemble.init(jax.random.key(0), X)["params"]

    def loss(params, x):
        return jnp.square(ensemble.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, X)
    (path,) = layers
    grads = jax.grad(loss)(params, X)
    updates = jax.tree.map(lambda g, r: 0.3 * r - g, grads, random_like(params, 3))
    # A member that does not move has no angle, and does not hide those of the others.
    updates = jax.tree.map(lambda x: x.at[1].set(0), updates)
    found = tekfac.step_diagnostics(layers, params, grads, updates)
    members = [
        [vector(jax.tree.map(lambda x, i=i: x[i], tree)) for tree in (updates, params, grads)]
        for i in (0, 2)
    ]
    angle = max(degrees(step, -grad) for step, _, grad in members)
    assert angle < 90  # the angle that zero vectors would appear to have
    ratio = max(np.linalg.norm(step) / np.linalg.norm(weight) for step, weight, _ in members)
    np.testing.assert_allclose(found[f"{path}/angle"], angle, rtol=1e-5)
    np.testing.assert_allclose(found[f"{path}/update_ratio"], ratio, rtol=1e-5)


def test_masked_layers_are_left_out():
    masked = {**GRADS, "Dense_0": optax.MaskedNode()}
    found = tekfac.step_diagnostics(LAYERS, PARAMS, GRADS, masked)
    assert set(found) == {"Dense_1/update_ratio", "Dense_1/angle"}


def test_modules_of_nnx():
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))

    def loss(model, x):
        return jnp.square(model(x)).mean()

    layers = tekfac_jax.nnx.find_layers(loss, model, X)
    grads = nnx.grad(loss)(model, X)
    params, updates = nnx.state(model, nnx.Param), jax.tree.map(lambda g: -0.1 * g, grads)
    found = tekfac.step_diagnostics(layers, params, grads, updates)
    np.testing.assert_allclose(found["~/angle"], 0, atol=1e-4)


@pytest.mark.parametrize("argument", ["params", "grads", "updates"])
def test_a_tree_of_another_network_is_named(argument):
    trees = {"params": PARAMS, "grads": GRADS, "updates": GRADS}
    trees[argument] = {"Dense_0": PARAMS["Dense_0"]}
    with pytest.raises(ValueError, match=f"'{argument}'.*no leaf 'Dense_1/"):
        tekfac.step_diagnostics(LAYERS, **trees)
