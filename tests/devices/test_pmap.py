"""Steps under `vmap`, `pmap` and `shard_map` give the numbers of a loop, or of one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tests.capturing import (
    EXACT,
    SINGLE,
    Net,
    losses_of,
    mlp,
    mlp_case,
    randn,
    random_params,
    relative_error,
    x64,
    x64_standard,
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1])(nn.LayerNorm()(x))), None


def stacked(x):
    """Layers stacked by a scan, with remat and a normalisation in each."""
    blocks = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    return nn.Dense(3)(blocks()(x, None)[0])


def tied(x):
    """Words that are read and scored with the same table."""
    table = nn.Embed(5, 4)
    ids = (jnp.abs(x[:, :3]) * 3).astype(jnp.int32) % 5
    return table.attend(jnp.tanh(nn.Dense(4)(table(ids))))


def training_step(axis_name=None, mean_over=jax.lax.pmean, build=mlp, mode="raw"):
    model, x = Net(build), randn(6, 4)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    params = random_params(model, x)
    layers = tekfac.find_layers(loss, params, x, norm="unitwise")
    options = {"factor_interval": 1, "rescaling_interval": 1, "eigenbasis_interval": 2}
    tx = optax.chain(
        tekfac.scale_by_tekfac(layers, damping=0.1, axis_name=axis_name, **options), optax.sgd(0.1)
    )

    def step(params, opt_state, x):
        further = {"opt_state": opt_state} if mode == "reduced" else {}
        fn = tekfac.value_grad_and_stats(loss, layers, mode=mode)
        _, grads, stats = fn(params, x, **further)
        if axis_name is not None:
            grads = mean_over(grads, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
        return optax.apply_updates(params, updates), opt_state

    return step, params, tx, x


@pytest.mark.slow
@x64
def test_vmap_over_a_training_step_is_a_loop():
    step, params, tx, x = training_step()
    ensemble = [jax.tree.map(lambda p, c=c: c * p, params) for c in (1.0, 1.5)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ensemble)
    states = jax.vmap(tx.init)(together)
    for _ in range(3):
        together, states = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(together, states, x)
    for i, params in enumerate(ensemble):
        state = tx.init(params)
        for _ in range(3):
            params, state = jax.jit(step)(params, state, x)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        for key in params:
            for name in ("kernel", "bias"):
                assert relative_error(one[key][name], params[key][name]) <= EXACT


def _pmap(step):
    return jax.pmap(step, "devices", in_axes=(None, None, 0), devices=jax.devices()[:2])


def _divide(grads, axis_name):
    """Averages sums: with `check_vma` JAX sums the gradients of replicated parameters."""
    return jax.tree.map(lambda g: g / jax.lax.axis_size(axis_name), grads)


def _shard_map(step, **options):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2], axis_types=auto)
    spec = jax.sharding.PartitionSpec

    def local(params, state, x):
        return jax.tree.map(lambda leaf: leaf[None], step(params, state, x[0]))

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec(), spec(), spec("devices")),
            out_specs=spec("devices"),
            **options,
        )
    )


@x64_standard
@pytest.mark.timeout(120)
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize(
    ("over_devices", "mean_over"),
    [
        (_pmap, jax.lax.pmean),
        (functools.partial(_shard_map, check_vma=False), jax.lax.pmean),
        (functools.partial(_shard_map, check_vma=True), _divide),
    ],
    ids=["pmap", "shard_map", "shard_map with check_vma"],
)
@pytest.mark.parametrize(
    ("build", "mode"),
    [
        (mlp, "raw"),
        (stacked, "reduced"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(mlp, "reduced"), (stacked, "raw"), (tied, "raw"), (tied, "reduced")]
        ),
    ],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_several_devices_are_one(over_devices, mean_over, build, mode):
    step, params, tx, x = training_step(build=build, mode=mode)
    local_step, *_ = training_step("devices", mean_over, build, mode)
    state, local_params, local_state = tx.init(params), params, tx.init(params)
    run = over_devices(local_step)
    for _ in range(3):
        params, state = jax.jit(step)(params, state, x)
        replicas = run(local_params, local_state, x.reshape(2, 3, 4))
        local_params, local_state = jax.tree.map(lambda leaf: leaf[0], replicas)
        for leaf in jax.tree.leaves(replicas):
            np.testing.assert_array_equal(leaf[0], leaf[1])
    errors = jax.tree.map(relative_error, local_params, params)
    assert max(jax.tree.leaves(errors)) <= 1e-9


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("check_vma", [False, True])
def test_captures_under_shard_map(check_vma):
    """Each device captures its part of the batch, whether shard_map tracks replication or not."""
    loss, params, x = mlp_case()
    layers = tekfac.find_layers(loss, params, x)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2])
    replicated, split = (jax.sharding.PartitionSpec(*axes) for axes in ((), ("devices",)))

    def captures(params, x):
        _, _, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        return jax.tree.map(lambda c: c * stats.scale, stats.layers)

    in_specs = (replicated, split)
    local = jax.shard_map(
        captures, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=check_vma
    )
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, split))
        actual = jax.jit(local)(params, sharded)
    expected = captures(params, x)
    for path in layers:
        assert relative_error(actual[path][0].u, expected[path][0].u) <= SINGLE


def normalised_mlp(x):
    return nn.Dense(3)(nn.LayerNorm()(jnp.tanh(nn.Dense(4)(x))))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("factors", ["exact", "plain"])
def test_sums_of_a_normalisation_under_shard_map(factors):
    """Each device's sums vary over the devices, as shard_map checks, and add up to the whole."""
    model, x = Net(normalised_mlp), randn(6, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x, norm="unitwise")
    fn = tekfac.value_grad_and_stats(loss, layers, mode="reduced", factors=factors)

    def sums(params, x):
        return jax.tree.map(lambda leaf: leaf[None], fn(params, x)[2].layers)

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2], axis_types=auto)
    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(
        sums, mesh=mesh, in_specs=(spec(), spec("devices")), out_specs=spec("devices")
    )
    actual, expected = jax.jit(run)(params, x), fn(params, x)[2].layers
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert relative_error(one.sum(axis=0), other) <= SINGLE
