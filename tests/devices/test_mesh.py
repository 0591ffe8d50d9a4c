"""Training on a mesh gives the numbers of one device, with a whole or a divided state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tekfac_jax as tekfac
from tekfac_jax._curvature import eigenbasis
from tests.capturing import losses_of, x64
from tests.sharing import Network, assert_same, layers_of, limited, mesh_of, needs_devices


@needs_devices
@limited
@x64
@pytest.mark.parametrize("mode", ["raw", pytest.param("reduced", marks=pytest.mark.slow)])
@pytest.mark.sampled
@pytest.mark.parametrize(
    ("shape", "kernels", "options"),
    [
        ((4,), None, {}),
        ((2, 2), P(None, "model"), {"mesh_axis": "data"}),
        pytest.param((2, 2), None, {"mesh_axis": ("data", "model")}, marks=pytest.mark.slow),
        pytest.param((2,), P("data", None), {}, marks=pytest.mark.slow),
    ],
    ids=["data", "tensor parallel", "both axes", "sharded kernels"],
)
def test_sharded_jit_is_one_device(shape, kernels, options, mode):
    network = Network(mode)
    expected = network.on_one_device()
    assert_same(network.on_mesh(mesh_of(*shape), kernels=kernels, **options), expected)


class ShardedRun:
    """Training on a mesh with a divided state."""

    def __init__(self, network, devices, **options):
        self.mesh = mesh_of(devices)
        self.tx = network.transform(mesh=self.mesh, shard_state=True, **options)
        shapes = jax.eval_shape(self.tx.init, network.params)
        self.shardings = tekfac.opt_state_sharding(network.layers, self.mesh, shapes)
        self.state = jax.jit(self.tx.init, out_shardings=self.shardings)(network.params)
        self.params = jax.device_put(network.params, NamedSharding(self.mesh, P()))
        self.network = network
        step = network.step(self.tx)
        self.step = jax.jit(step, out_shardings=(NamedSharding(self.mesh, P()), self.shardings))

    def run(self, steps):
        x = jax.device_put(self.network.x, NamedSharding(self.mesh, P("data")))
        for _ in range(steps):
            self.params, self.state = self.step(self.params, self.state, x)
        return self.params


@needs_devices
@limited
@x64
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["raw", "reduced"])
def test_a_divided_state_gives_the_same_numbers(mode, tmp_path):
    """Two devices, then from a checkpoint on four; what is read from the state is whole."""
    network = Network(mode)
    first = ShardedRun(network, 2)
    first.run(2)
    plain_state = network.transform().init(network.params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (first.params, first.state))
        checkpointer.wait_until_finished()
        second = ShardedRun(network, 4)
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            second.state, second.shardings,
        )  # fmt: skip
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), second.params
        )
        second.params, second.state = checkpointer.restore(tmp_path / "state", (params, shapes))
    for x, y in zip(*map(jax.tree.leaves, (first.state, second.state)), strict=True):
        np.testing.assert_array_equal(x, y)  # bit for bit, on other devices
    assert_same(second.run(2), network.on_one_device(4))
    shapes = [jax.tree.map(jnp.shape, tekfac.curvature(s)) for s in (second.state, plain_state)]
    assert shapes[0] == shapes[1]
    assert set(tekfac.diagnostics(second.state)) == set(tekfac.diagnostics(plain_state))
    layer = second.state[0].layers["hidden"]
    for name in ("phi", "psi", "q_phi", "q_psi"):
        parts = {shard.data.shape for shard in getattr(layer, name).addressable_shards}
        assert parts == {(getattr(layer, name).size // 4,)}


@needs_devices
@limited
def test_memory_of_a_divided_state_falls_with_the_devices():
    """Of a 500×500 layer each device keeps its share of four matrices, and all of Θ."""
    layers = layers_of((500, 500))
    params = {"layer_0": {"kernel": jnp.zeros((500, 500))}}
    sizes = {}
    for devices in (1, 2, 4):
        mesh = mesh_of(devices)
        tx = tekfac.scale_by_tekfac(layers, mesh=mesh, shard_state=True)
        shardings = tekfac.opt_state_sharding(layers, mesh, jax.eval_shape(tx.init, params))
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        layer = state.layers["layer_0"]
        sizes[devices] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(layer))
    theta = 4 * 500**2
    for devices in (2, 4):
        assert sizes[devices] - theta == pytest.approx((sizes[1] - theta) / devices, rel=0.02)


def counting_eigh(monkeypatch):
    """Counts the decompositions on all devices together."""
    done: list[int] = []
    eigh = jnp.linalg.eigh

    def counted(x, **options):
        jax.debug.callback(lambda: done.append(x.shape[-1]))
        return eigh(x, **options)

    monkeypatch.setattr(eigenbasis.jnp.linalg, "eigh", counted)
    return done


@pytest.mark.slow
@needs_devices
@limited
@pytest.mark.parametrize("how", ["mesh", "shard_map", "pmap"])
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_each_decomposition_is_done_once(how, monkeypatch):
    network = Network()
    expected = network.on_one_device(steps=1)
    done = counting_eigh(monkeypatch)
    if how == "mesh":
        actual = network.on_mesh(mesh_of(4), steps=1)
    else:
        tx = network.transform(axis_name="data")
        step = network.step(tx, functools.partial(jax.lax.pmean, axis_name="data"))
        args = network.params, tx.init(network.params)
        if how == "pmap":
            run = jax.pmap(step, "data", in_axes=(None, None, 0), devices=jax.devices()[:4])
            actual, _ = run(*args, network.x.reshape(4, 4, 3, 2))
            actual = jax.tree.map(lambda leaf: leaf[0], actual)
        else:
            run = jax.shard_map(
                step, mesh=mesh_of(4), in_specs=(P(), P(), P("data")), out_specs=P(),
                check_vma=False,
            )  # fmt: skip
            actual, _ = jax.jit(run)(*args, network.x)
    jax.effects_barrier()
    plan = tekfac.device_plan(network.layers, 4)
    assert sorted(done) == sorted(share.dim for share in plan.assignments)
    assert_same(actual, expected, 1e-4)


@pytest.mark.slow
@needs_devices
@limited
@x64
def test_hyperparameters_are_injected_on_a_mesh():
    network = Network()
    mesh = mesh_of(2)
    tx = optax.inject_hyperparams(tekfac.scale_by_tekfac, static_args=("layers", "mesh"))(
        network.layers, mesh=mesh, factor_decay=0.5, damping=0.1
    )
    plain = tekfac.scale_by_tekfac(network.layers, factor_decay=0.5, damping=0.1)
    _, grads, stats = tekfac.value_grad_and_stats(network.loss, network.layers)(
        network.params, network.x
    )
    actual, _ = jax.jit(tx.update)(grads, tx.init(network.params), stats=stats)
    expected, _ = jax.jit(plain.update)(grads, plain.init(network.params), stats=stats)
    assert_same(actual, expected)


@pytest.mark.slow
@needs_devices
@limited
@x64
@pytest.mark.parametrize("mode", ["raw", "reduced"])
def test_a_batch_that_is_filled_up(mode):
    """Thirteen examples on four devices, with three filler examples."""
    network = Network(mode)
    real = 13
    weights = (jnp.arange(16) < real).astype(network.x.dtype)

    def masked(params, x, weights):
        return (losses_of(network.model.apply({"params": params}, x)) * weights).sum() / real

    def first_update(tx, loss, args, place=lambda v: v, **options):
        @jax.jit
        def run(params, *args):
            fn = tekfac.value_grad_and_stats(loss, network.layers, mode=mode, **options)
            state, updates = tx.init(params), None
            for _ in range(2):
                further = {"opt_state": state} if mode == "reduced" else {}
                _, grads, stats = fn(params, *args, **further)
                updates, state = tx.update(grads, state, params, stats=stats)
            return updates

        return run(network.params, *map(place, args))

    mesh = mesh_of(4)
    actual = first_update(
        network.transform(mesh=mesh), masked, (network.x, weights),
        lambda v: jax.device_put(v, NamedSharding(mesh, P("data"))), reduction=real, examples=real,
    )  # fmt: skip
    expected = first_update(network.transform(), network.loss, (network.x[:real],))
    assert_same(actual, expected)


@pytest.mark.slow
@needs_devices
@limited
@x64
def test_accumulation_on_devices_is_the_whole_batch():
    """Two micro-batches on each of two devices, summed on each device, then over devices."""
    network = Network("reduced")
    expected = network.on_one_device(3)
    tx = network.transform(axis_name="data")
    fn = tekfac.value_grad_and_stats(network.loss, network.layers, mode="reduced")

    def step(params, state, x):
        parts = [fn(params, part, opt_state=state)[1:] for part in jnp.split(x, 2)]
        grads, stats = jax.tree.map(jnp.add, *parts)
        grads = jax.lax.pmean(jax.tree.map(lambda g: g / 2, grads), "data")
        updates, state = tx.update(grads, state, params, stats=stats)
        return optax.apply_updates(params, updates), state

    run = jax.jit(
        jax.shard_map(
            step, mesh=mesh_of(2), in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False
        )
    )
    params, state = network.params, tx.init(network.params)
    for _ in range(3):
        params, state = run(params, state, network.x)
    assert_same(params, expected)


@needs_devices
@limited
@pytest.mark.parametrize("size", [3, 13])
def test_a_batch_that_cannot_be_divided_is_refused(size):
    network = Network()
    tx = network.transform(mesh=mesh_of(4))
    step = jax.jit(network.step(tx))
    with pytest.raises(ValueError, match=rf"batch of {size} examples.*4 devices.*examples="):
        step(network.params, tx.init(network.params), network.x[:size])


@needs_devices
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mesh": "data"}, r"mesh must be a jax\.sharding\.Mesh, got str"),
        ({"mesh_axis": "data"}, "mesh_axis='data' needs mesh="),
        ({"shard_state": True}, "shard_state=True needs mesh="),
        ({"mesh": 4, "mesh_axis": "rows"}, r"mesh_axis must be among.*\('data',\).*got 'rows'"),
        ({"mesh": 4, "mesh_axis": ()}, "mesh_axis must be among"),
        ({"mesh": 4, "axis_name": "data"}, "pass only one of them"),
    ],
)
def test_wrong_meshes_are_refused(options, says):
    options = {k: mesh_of(v) if v == 4 else v for k, v in options.items()}
    with pytest.raises(ValueError, match=says):
        tekfac.scale_by_tekfac(layers_of((3, 3)), **options)
