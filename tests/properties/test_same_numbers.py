"""Ten steps give the numbers that were saved: refactoring changes none of them.

``python -m tests.properties.test_same_numbers`` saves them again after an intended change of the
mathematics.
"""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tekfac_jax as tekfac

SAVED = Path(__file__).parent / "same_numbers.npz"
REORDERED = 1e-12  # relative, float64: sums may be in another order
STEPS = 10
INTERVALS = {"factor_interval": 2, "eigenbasis_interval": 3, "rescaling_interval": 4}

# Name -> (member, options of the transformation, how the statistics reach it).
SCENARIOS = {
    **{name: (name, {}, "raw") for name in ("tekfac", "tkfac", "ekfac", "kfac")},
    "early": ("tekfac", {"early_refreshes": True}, "raw"),
    "factored": ("kfac", {"damping_form": "factored"}, "raw"),
    "fixed damping": ("tekfac", {"damping": 0.03}, "raw"),
    "location": ("tekfac", {"factors": "location"}, "raw"),
    "running": ("tekfac", {"rescaling": "running"}, "raw"),
    "sampled": ("tekfac", {"statistics_examples": 8}, "raw"),
    "staggered": ("tekfac", {"stagger": True}, "raw"),
    "truncated": ("tekfac", {"basis_rank": 3}, "raw"),
    "reduced": ("tekfac", {}, "reduced"),
    "reduced, tkfac": ("tkfac", {}, "reduced"),
    "mesh": ("tekfac", {}, "mesh"),
    "mesh, staggered": ("ekfac", {"stagger": True}, "mesh"),
    "mesh, divided": ("tekfac", {"shard_state": True}, "mesh"),
}


IN_THE_DEFAULT_RUN = {"tekfac", "staggered", "truncated", "reduced", "mesh, divided"}


class Net(nn.Module):
    """Convolutions with and without groups, and a dense layer; no factor is singular."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (3, 3), name="first")(x))
        x = jnp.tanh(nn.Conv(4, (2, 2), strides=2, feature_group_count=2, name="second")(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def loss_fn(params, x, y):
    logits = Net().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache
def problem():
    """Batches of sixteen, parameters and layers, in float64."""
    rng = np.random.default_rng(0)
    xs, ys = rng.normal(size=(STEPS, 16, 6, 6, 2)), rng.integers(3, size=(STEPS, 16))
    shapes = jax.eval_shape(lambda: Net().init(jax.random.key(0), xs[0]))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape)), shapes)
    return xs, ys, params, tekfac.find_layers(loss_fn, params, xs[0], ys[0])


def numbers_of(name: str) -> dict[str, np.ndarray]:
    """The parameters after all steps, and λ and tr Θ of each layer."""
    member, options, how = SCENARIOS[name]
    xs, ys, params, layers = problem()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if how == "mesh":
        options = {**options, "mesh": mesh}
    tx = getattr(tekfac, member)(0.1, layers, **(INTERVALS | options))
    mode = "reduced" if how == "reduced" else "raw"
    factors = "plain" if member in ("kfac", "ekfac") else "exact"
    grad_fn = tekfac.value_grad_and_stats(loss_fn, layers, mode=mode, factors=factors)

    @jax.jit
    def step(params, opt_state, x, y):
        further = {"opt_state": opt_state} if mode == "reduced" else {}
        _, grads, stats = grad_fn(params, x, y, **further)
        updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(tx.init)(params)
    for x, y in zip(xs, ys, strict=True):
        if how == "mesh":
            x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
        # One step in flight: on CPU several programs with collectives can wait for one another.
        params, opt_state = jax.block_until_ready(step(params, opt_state, x, y))
    found = {f"{layer}/{k}": v for layer, own in params.items() for k, v in own.items()}
    scalars = tekfac.diagnostics(opt_state)
    found |= {k: v for k, v in scalars.items() if k.endswith(("/trace", "/damping", "kl_clip"))}
    return {f"{name}: {key}": np.asarray(value) for key, value in found.items()}


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_THE_DEFAULT_RUN else pytest.param(name, marks=pytest.mark.slow)
        for name in SCENARIOS
    ],
)
def test_the_numbers_are_those_of_before(name, x64):
    with jax.numpy_dtype_promotion("standard"):  # of optax
        found = numbers_of(name)
    with np.load(SAVED) as saved:
        expected = {key: saved[key] for key in saved.files if key.startswith(f"{name}: ")}
    assert set(found) == set(expected)
    for key, value in found.items():
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(
            value, expected[key], rtol=0, atol=REORDERED * scale, err_msg=key
        )


if __name__ == "__main__":
    with jax.enable_x64(True):
        every = [numbers_of(name) for name in SCENARIOS]
    np.savez(SAVED, **{key: value for found in every for key, value in found.items()})
