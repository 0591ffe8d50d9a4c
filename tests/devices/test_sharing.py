"""Work shared out over devices: one plan, each decomposition done once, one device's numbers."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tekfac_jax as tekfac
from tekfac_jax._curvature import eigenbasis
from tekfac_jax._devices import collectives
from tekfac_jax._layers.spec import LayerSpec
from tests.capturing import Net, losses_of, randn, random_params, relative_error, x64

EXACT = 1e-10
DEVICES = 4
needs_devices = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs four devices")
limited = pytest.mark.timeout(240)


def layers_of(*dims):
    """Dense layers of these (in, out) dimensions, without bias."""
    return tekfac.Layers(
        tuple(
            LayerSpec(
                path=f"layer_{i}", kind="dense", kernel_shape=shape, contracted=1, use_bias=False,
                dtype="float32", axes=(-1,),
            )
            for i, shape in enumerate(dims)
        )
    )  # fmt: skip


# --- the plan --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    dims=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20),
    devices=st.integers(1, 12),
)
def test_the_plan_does_everything_once_and_is_balanced(dims, devices):
    plan = tekfac.device_plan(layers_of(*dims), devices)
    done = sorted((share.path, share.side, share.dim) for share in plan.assignments)
    sides = [(f"layer_{i}", side, d[k]) for i, d in enumerate(dims)
             for k, side in enumerate(("phi", "psi")) if d[k] > 2]  # fmt: skip
    assert done == sorted(sides)
    assert sum(plan.loads) == sum(dim**3 for _, _, dim in sides)
    assert all(0 <= share.device < devices for share in plan.assignments)
    if plan.assignments:
        # The best there could be: the mean, the largest alone, or two of the largest together.
        cubes = sorted((share.dim**3 for share in plan.assignments), reverse=True)
        together = cubes[devices - 1] + cubes[devices] if len(cubes) > devices else 0
        best = max(sum(cubes) / devices, cubes[0], together)
        assert max(plan.loads) <= (4 / 3) * best + 1e-6 or max(plan.loads) <= (
            sum(cubes) / devices + cubes[-1]
        )
        assert 1 <= plan.bound <= plan.balance + 1e-9 <= devices + 1e-6


def test_stacked_layers_and_groups_are_shared_one_by_one():
    spec = LayerSpec(
        path="blocks", kind="dense", kernel_shape=(6, 4), contracted=1, use_bias=True,
        dtype="float32", axes=(-1,), stack=(3,), kernel_stack=(0,), bias_stack=(0,),
    )  # fmt: skip
    plan = tekfac.device_plan(tekfac.Layers((spec,)), 3)
    assert sorted(plan.owners("blocks", "phi")) == [0, 1, 2]
    assert sorted(plan.owners("blocks", "psi")) == [0, 1, 2]
    assert plan.balance == pytest.approx(1)
    assert "3×7" not in repr(plan)
    assert repr(plan).count("1×7, 1×4") == 3


def test_an_embedding_has_one_side_only():
    spec = LayerSpec(
        path="words", kind="embed", kernel_shape=(1000, 8), contracted=1, use_bias=False,
        dtype="float32",
    )  # fmt: skip
    plan = tekfac.device_plan(tekfac.Layers((spec,)), 2)
    assert [share.dim for share in plan.assignments] == [8]


@pytest.mark.parametrize("devices", [0, -1, 1.5, True, "two"])
def test_number_of_devices_out_of_range(devices):
    with pytest.raises(ValueError, match=r"devices must be a whole number, 1 or more, got"):
        tekfac.device_plan(layers_of((3, 3)), devices)


# --- triangles -------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("dim", [1, 2, 3, 6, 7])
def test_a_triangle_is_the_whole_matrix(dim, lead):
    x = np.random.default_rng(dim).normal(size=(*lead, dim, dim)).astype(np.float32)
    x = x + np.swapaxes(x, -1, -2)
    packed = collectives._pack(jnp.asarray(x))
    np.testing.assert_array_equal(collectives._unpack(jnp.asarray(x), packed), x)
    numbers = sum(part.size for part in jax.tree.leaves(packed)) // math.prod(lead)
    k = (dim + 1) // 2
    assert numbers <= dim * (dim + 1) // 2 + k


@pytest.mark.slow
@needs_devices
@limited
def test_a_vector_is_no_triangle():
    """As many embeddings side by side as they have rows: Φ looks like a square, and is none."""
    tables = nn.vmap(
        nn.Embed, in_axes=None, out_axes=1, axis_size=3, variable_axes={"params": 0},
        split_rngs={"params": True},
    )  # fmt: skip
    model, ids = tables(3, 2), jnp.asarray([0, 1, 2, 2])
    params = model.init(jax.random.key(0), ids)["params"]

    def loss(params, ids):
        return losses_of(model.apply({"params": params}, ids)).mean()

    layers = tekfac.find_layers(loss, params, ids)

    def delta(**options):
        tx = tekfac.scale_by_tkfac(layers, **options)

        @jax.jit
        def run(params, ids):
            _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, ids)
            return tx.update(grads, tx.init(params), stats=stats)[1]

        (found,) = tekfac.curvature(run(params, ids)).values()
        return found.delta

    assert relative_error(delta(mesh=mesh_of(2)), delta()) <= 1e-5


# --- the same numbers ------------------------------------------------------------------------


class Network:
    """A small network, and training steps of it that differ in how they run."""

    def __init__(self, mode="raw", **options):
        def build(x):
            x = jnp.tanh(nn.Conv(3, (2,), name="conv")(x))
            x = jnp.tanh(nn.Dense(4, name="hidden")(x.reshape(len(x), -1)[:, :6]))
            return nn.Dense(2, name="head")(x)

        self.model, self.x = Net(build), randn(16, 3, 2)
        self.params = random_params(self.model, self.x)
        self.layers = tekfac.find_layers(self.loss, self.params, self.x)
        self.mode = mode
        self.options = {
            "factor_interval": 1, "rescaling_interval": 1, "eigenbasis_interval": 2,
            "damping": 0.1, **options,
        }  # fmt: skip

    def loss(self, params, x):
        return losses_of(self.model.apply({"params": params}, x)).mean()

    def transform(self, **options):
        return optax.chain(
            tekfac.scale_by_tekfac(self.layers, **self.options, **options), optax.sgd(0.1)
        )

    def step(self, tx, average=lambda grads: grads):
        def step(params, state, x):
            further = {"opt_state": state} if self.mode == "reduced" else {}
            fn = tekfac.value_grad_and_stats(self.loss, self.layers, mode=self.mode)
            _, grads, stats = fn(params, x, **further)
            updates, state = tx.update(average(grads), state, params, stats=stats)
            return optax.apply_updates(params, updates), state

        return step

    def on_one_device(self, steps=4):
        tx = self.transform()
        params, state = self.params, tx.init(self.params)
        step = jax.jit(self.step(tx))
        for _ in range(steps):
            params, state = step(params, state, self.x)
        return params

    def on_mesh(self, mesh, steps=4, kernels=None, **options):
        """`jit` with NamedSharding: the batch is split, kernels are placed as given."""
        tx = self.transform(mesh=mesh, **options)
        axis = options.get("mesh_axis", mesh.axis_names[0])
        x = jax.device_put(self.x, NamedSharding(mesh, P(axis)))

        def placed(leaf):
            fits = kernels and leaf.ndim == len(kernels) and not any(d % 2 for d in leaf.shape)
            return jax.device_put(leaf, NamedSharding(mesh, kernels if fits else P()))

        params = jax.tree.map(placed, self.params)
        step, state = jax.jit(self.step(tx)), tx.init(params)
        for _ in range(steps):
            params, state = step(params, state, x)
        return params


def assert_same(actual, expected, tolerance=EXACT):
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) <= tolerance, errors


def mesh_of(*shape, names=("data", "model")):
    devices = jax.devices()[: math.prod(shape)]
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names[: len(shape)], devices=devices, axis_types=auto)


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
    """Training on a mesh with a divided state, and what it leaves."""

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
    """On two devices, then from a checkpoint on four; what is read of it is whole."""
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
        np.testing.assert_array_equal(x, y)  # to the bit, on other devices
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
    """A layer of 500×500: a device keeps a quarter of its four matrices, and all of Θ."""
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
    """Counts the decompositions that are run, on all devices together."""
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
    """Thirteen examples on four devices: three more that do not count."""
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
@pytest.mark.parametrize("sibling", ["kfac", "ekfac"])
def test_plain_factors_and_examples_that_do_not_count(sibling):
    """A does not see which examples are masked: no curvature comes of it, and a failure counts."""
    network = Network()
    tx = {"kfac": tekfac.scale_by_kfac, "ekfac": tekfac.scale_by_ekfac}[sibling](network.layers)
    fn = tekfac.value_grad_and_stats(network.loss, network.layers, examples=5)
    _, grads, stats = fn(network.params, network.x)
    updates, state = tx.update(grads, tx.init(network.params), stats=stats)
    assert all(layer.failures > 0 for layer in state.layers.values())
    assert_same(updates, grads, 0)
    with pytest.raises(ValueError, match=r'examples= cannot be combined with factors="plain"'):
        tekfac.value_grad_and_stats(
            network.loss, network.layers, examples=5, mode="reduced", factors="plain"
        )


@pytest.mark.parametrize("mode", ["raw", "reduced"])
def test_more_examples_than_there_are(mode):
    network = Network(mode)
    fn = functools.partial(tekfac.value_grad_and_stats, network.loss, network.layers, mode=mode)
    with pytest.raises(ValueError, match="examples=40 exceeds the batch of 16"):
        fn(examples=40)(network.params, network.x)
    tx = tekfac.scale_by_tkfac(network.layers)

    @jax.jit
    def run(params, x, count):
        _, grads, stats = fn(examples=count)(params, x)
        return tx.update(grads, tx.init(params), stats=stats)[1]

    state = run(network.params, network.x, jnp.float32(40))
    assert all(layer.failures > 0 for layer in state.layers.values())
    assert not any(layer.basis_valid for layer in state.layers.values())


@pytest.mark.slow
@needs_devices
@limited
@x64
def test_accumulation_on_devices_is_the_whole_batch():
    """Two micro-batches on each of two devices, added up there, then over the devices."""
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
        ({"mesh": 4, "axis_name": "data"}, "pass one of them"),
    ],
)
def test_wrong_meshes_are_refused(options, says):
    options = {k: mesh_of(v) if v == 4 else v for k, v in options.items()}
    with pytest.raises(ValueError, match=says):
        tekfac.scale_by_tekfac(layers_of((3, 3)), **options)


@needs_devices
@limited
def test_only_triangles_of_factors_travel():
    """Bytes of all-reduces in the compiled step, against those of whole matrices."""
    layers = Network().layers
    i = layers["hidden"].in_dim
    assert i > layers["hidden"].out_dim
    network = Network(eigenbasis_interval=1)
    tx = network.transform(axis_name="data")
    run = jax.shard_map(
        network.step(tx, functools.partial(jax.lax.pmean, axis_name="data")), mesh=mesh_of(4),
        in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False,
    )  # fmt: skip
    jaxpr = jax.make_jaxpr(run)(network.params, tx.init(network.params), network.x)
    sizes = [v.aval.shape for eqn in psums(jaxpr.jaxpr) for v in eqn.invars]
    halves = ((i + 1) // 2, (i + 1) // 2)
    assert sizes.count((i, i)) == 1  # the basis; the factor travels as a triangle
    assert halves in sizes


def psums(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("psum"):
            yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from psums(inner)
