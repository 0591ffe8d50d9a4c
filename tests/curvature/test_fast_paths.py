"""Each fast path against the slow one: orders of contraction, G formed once, part of a batch."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tekfac_jax as tekfac
from tekfac_jax._curvature import by_kind, chunks, dense
from tekfac_jax._curvature.cost import FactorOrder, RescalingOrder, factor_order, rescaling_order
from tekfac_jax._layers.spec import LayerSpec
from tekfac_jax._layers.statistics import Capture
from tekfac_jax._optimizer import refresh, sums
from tests.capturing import Net, losses_of, random_params, relative_error, x64
from tests.devices.test_sharing import Network, assert_same, mesh_of, needs_devices
from tests.oracles import make_case, per_example_matrices, relative

EXACT = 1e-12
SIZES = st.integers(1, 9)
DIMS = st.integers(1, 3000)
ORDERS = tuple(itertools.product((False, True), repeat=2))
LEADS = st.sampled_from([(), (2,), (2, 3)])


def random_captures(lead, n, t, i, o, seed):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(*lead, n, t, d))) for d in (i, o))


def by_einsum(a, u):
    g = np.einsum("...nti,...nto->...nio", a, u)
    return g, np.einsum("...nio,...njo->...ij", g, g), np.einsum("...nio,...nip->...op", g, g)


# --- orders ----------------------------------------------------------------------------------


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, seed=st.integers(0, 99))
def test_factors_in_every_order(order, lead, n, t, i, o, seed):
    a, u = random_captures(lead, n, t, i, o, seed)
    _, phi, psi = by_einsum(a, u)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "factor_order", lambda *_: FactorOrder(*order))
        patch.setattr(dense, "_BLOCK", 3)  # so that large ones are put together from blocks
        # Compiled as a whole, and anew: the order is another one.
        found = jax.jit(lambda a, u: dense.exact_factors(a, u))(a, u)
    assert relative(found.phi, phi) <= EXACT
    assert relative(found.psi, psi) <= EXACT


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, r=SIZES, p=SIZES, seed=st.integers(0, 99))
def test_rescaling_in_every_order(order, lead, n, t, i, o, r, p, seed):
    a, u = random_captures(lead, n, t, i, o, seed)
    rng = np.random.default_rng(seed + 1)
    q_phi, q_psi = (jnp.asarray(rng.normal(size=(*lead, d, k))) for d, k in ((i, r), (o, p)))
    g = np.einsum("...ir,...nio,...op->...nrp", q_phi, by_einsum(a, u)[0], q_psi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "rescaling_order", lambda *_: RescalingOrder(*order))
        found = jax.jit(lambda *arrays: dense.rescaling(*arrays))(a, u, q_phi, q_psi)
    assert relative(found, (g**2).sum(axis=-3)) <= EXACT


@pytest.mark.slow
@x64
@pytest.mark.parametrize("way", ["pairs of positions", "example by example", "all at once"])
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, seed=st.integers(0, 99))
def test_squared_gradients_in_every_way(way, lead, n, t, i, o, seed):
    a, u = random_captures(lead, n, t, i, o, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_FEW", 100 if way == "pairs of positions" else 0)
        patch.setattr(dense, "on_cpu", lambda: way == "example by example")
        found = jax.jit(lambda a, u: dense._squared_gradients(a, u))(a, u)
    assert relative(found, (by_einsum(a, u)[0] ** 2).sum(axis=-3)) <= EXACT
    assert float(found.min()) >= 0


@x64
@settings(deadline=None, max_examples=25)
@given(lead=LEADS, n=SIZES, t=SIZES, i=SIZES, o=SIZES, r=SIZES, p=SIZES, seed=st.integers(0, 99))
def test_from_gradients_formed_once(lead, n, t, i, o, r, p, seed):
    """Factors and Θ from G_n are those from a and u."""
    a, u = random_captures(lead, n, t, i, o, seed)
    rng = np.random.default_rng(seed + 1)
    q_phi, q_psi = (jnp.asarray(rng.normal(size=(*lead, d, k))) for d, k in ((i, r), (o, p)))
    factors, theta = jax.jit(
        lambda g, *q: (
            dense.factors_of_gradients(g),
            dense.rescaling_of_gradients(g, *q),
        )
    )(dense.gradients(a, u), q_phi, q_psi)
    _, phi, psi = by_einsum(a, u)
    assert relative(factors.phi, phi) <= EXACT
    assert relative(factors.psi, psi) <= EXACT
    assert relative(theta, dense.rescaling(a, u, q_phi, q_psi)) <= EXACT


@settings(max_examples=200)
@given(t=st.integers(2, 2000), i=DIMS, o=DIMS, r=DIMS, p=DIMS)
def test_no_order_is_cheaper_than_the_one_that_is_taken(t, i, o, r, p):
    r, p = min(r, i), min(p, o)
    taken = factor_order(t, i, o).cost(t, i, o)
    assert taken == min(FactorOrder(*order).cost(t, i, o) for order in ORDERS)
    taken = rescaling_order(t, i, o, r, p).cost(t, i, o, r, p)
    assert taken == min(RescalingOrder(*order).cost(t, i, o, r, p) for order in ORDERS)


# Positions, inputs, outputs: early and late layers of ResNet20 and of VGG16 at half width.
SHAPES = [(1024, 144, 16), (64, 576, 64), (16, 2304, 256), (4, 2304, 256)]


def flops(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("t", "i", "o"), SHAPES)
def test_what_is_computed_costs_what_the_order_says(t, i, o):
    """By XLA's own count of a compiled program: 2 flop for a multiplication and an addition.

    Half as much again is left for sums, copies and symmetry; an order that was switched off, as
    always forming G, costs from 2 to 60 times as much in the layers with few positions.
    """
    n = 2
    a, u = (n, t, i), (n, t, o)
    counted = flops(dense.exact_factors, a, u)
    assert counted <= 1.5 * 2 * n * factor_order(t, i, o).cost(t, i, o)
    for r, p in ((i, o), (-(-i // 8), -(-o // 4))):
        counted = flops(dense.rescaling, a, u, (i, r), (o, p))
        # Pairs of positions for few of them: more multiplications, but one matrix product.
        pairs = 2 * n * t * t * r * p if t <= dense._FEW else 0
        assert counted <= 1.5 * 2 * n * rescaling_order(t, i, o, r, p).cost(t, i, o, r, p) + pairs


def test_late_layers_never_form_the_gradient():
    assert factor_order(4, 2304, 256) == FactorOrder(False, False)
    assert rescaling_order(4, 2304, 256, 288, 64) == RescalingOrder(True, True)
    assert factor_order(1024, 144, 16) == FactorOrder(True, True)
    assert rescaling_order(1024, 144, 16, 144, 16) == RescalingOrder(False, False)


# --- chunks ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 4096), t=st.integers(1, 4096), i=DIMS, o=DIMS)
def test_a_chunk_stays_within_its_budget(n, t, i, o):
    """Of numbers in a, u and G_n of its examples, unless one example alone takes more."""
    spec = LayerSpec(
        path="layer", kind="dense", kernel_shape=(i, o), contracted=1, use_bias=False,
        dtype="float32", axes=(-1,),
    )  # fmt: skip
    shapes = [jax.ShapeDtypeStruct((n, t, d), jnp.float32) for d in (i, o)]
    size = chunks.chunk_size(spec, (Capture(*shapes),))
    assert 1 <= size <= n
    if t > 1 and size > 1:
        assert size * (t * (i + o) + i * o) <= chunks._NUMBERS
    if t > 1 and n * (t * (i + o) + i * o) <= chunks._NO_LOOP:
        assert size == n


@x64
@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 20), size=st.integers(1, 20), axis=st.integers(0, 1))
def test_a_sum_in_chunks(n, size, axis):
    x = jnp.moveaxis(jnp.asarray(np.random.default_rng(n).normal(size=(n, 3))), 0, axis)
    found = jax.jit(
        lambda x: chunks.sum_in_chunks(lambda x: jnp.sum(x**2, axis=axis), x, axis, size)
    )(x)
    assert relative(found, np.sum(np.asarray(x) ** 2, axis=axis)) <= EXACT


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
def test_gradients_in_chunks_are_in_order(size, monkeypatch):
    case = make_case("conv strided")
    layers = case.layers()
    _, stats = case.grads_and_stats(layers)
    spec, captures = layers[case.path], stats.layers[case.path]
    args = dense.gradients, spec, captures, stats.scale, jnp.float64
    whole = chunks.map_over_examples(*args)
    monkeypatch.setattr(chunks, "chunk_size", lambda *_: size)
    assert relative(chunks.map_over_examples(*args), whole) <= EXACT


# --- G formed once for factors and Θ -----------------------------------------------------------


def grouped(x):
    """Two convolutions in groups, and dense layers with several positions and with one."""
    x = jnp.tanh(nn.Conv(4, (3, 3), name="first")(x))
    x = jnp.tanh(nn.Conv(4, (3, 3), strides=2, feature_group_count=2, name="groups")(x))
    x = jnp.tanh(nn.Dense(5, name="positions")(x)).mean(axis=(1, 2))
    return nn.Dense(3, name="head")(x)


class Formed:
    """Steps of a network with all contractions, counting how often G is formed."""

    def __init__(self, patch, *, allowed):
        self.formed = []
        patch.setattr(by_kind, "_FORMED", 2**24 if allowed else -1)
        patch.setattr(dense, "gradients", self.counting(dense.gradients))

    def counting(self, gradients):
        def counted(a, u):
            jax.debug.callback(lambda: self.formed.append(a.shape[-3]))
            return gradients(a, u)

        return counted

    def steps(self, number, **options):
        model, x = Net(grouped), jnp.asarray(np.random.default_rng(0).normal(size=(9, 6, 5, 2)))
        params = random_params(model, x)

        def loss(params, x):
            return losses_of(model.apply({"params": params}, x)).mean()

        layers = tekfac.find_layers(loss, params, x)
        tx = tekfac.scale_by_tekfac(layers, damping=0.1, **options)

        @jax.jit
        def step(state, x):
            _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
            return tx.update(grads, state, params, stats=stats)

        state, found = tx.init(params), []
        for k in range(number):
            updates, state = step(state, (1 + 0.1 * k) * x)
            found.append(updates)
        jax.effects_barrier()
        return found, state


@pytest.mark.slow
@x64
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("intervals", [(1, 1, 1), (1, 2, 3), (3, 2, 1), (2, 1, 2)])
def test_formed_once_is_formed_twice(intervals, rank, monkeypatch):
    names = ("factor_interval", "eigenbasis_interval", "rescaling_interval")
    options = {**dict(zip(names, intervals, strict=True)), "basis_rank": rank}
    with monkeypatch.context() as patch:
        once = Formed(patch, allowed=True).steps(4, **options)
    with monkeypatch.context() as patch:
        twice = Formed(patch, allowed=False).steps(4, **options)
    for one, other in zip(*map(jax.tree.leaves, (once, twice)), strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            assert relative_error(one, other) <= 1e-9  # behind a solve
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@x64
def test_what_is_due_together_is_formed_once(monkeypatch):
    """Per step and layer the examples that pass through `gradients`."""
    counts = {}
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            formed = Formed(patch, allowed=allowed)
            formed.steps(1)
            counts[allowed] = sum(formed.formed)
    layers_with_positions = 3
    assert counts[True] == 9 * layers_with_positions
    assert counts[False] > counts[True]


@pytest.mark.slow
@x64
def test_nothing_is_formed_off_a_refresh(monkeypatch):
    with monkeypatch.context() as patch:
        formed = Formed(patch, allowed=True)
        formed.steps(1)
        first = len(formed.formed)
    with monkeypatch.context() as patch:
        formed = Formed(patch, allowed=True)
        formed.steps(5)
        assert len(formed.formed) == first


def steps_on_devices(patch, budget):
    """Two steps on four devices, and which layers' gradients were formed for factors and Θ."""
    formed, real = set(), refresh._formed_once

    def spy(*arguments):
        sources = real(*arguments)
        formed.update(path for path, s in sources.items() if isinstance(s, sums.Formed))
        return sources

    patch.setattr(refresh, "FORMED_IN_ALL", budget)
    patch.setattr(refresh, "_formed_once", spy)
    model, x = Net(grouped), jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 6, 5, 2)))
    params = random_params(model, x[0])

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x[0])
    tx = tekfac.scale_by_tekfac(
        layers, damping=0.1, axis_name="data", factor_interval=1, rescaling_interval=1
    )

    def step(state, x):
        _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
        return tx.update(jax.lax.pmean(grads, "data"), state, params, stats=stats)

    run = jax.pmap(step, axis_name="data")
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), tx.init(params))
    _, state = run(state, x)
    updates, _ = run(state, 1.1 * x)
    return formed, updates


@pytest.mark.slow
@needs_devices
@x64
@pytest.mark.timeout(240)
def test_devices_form_gradients_once_and_within_a_budget():
    found = {}
    for budget in (0, 1000, 2**27):  # numbers; of the three layers with positions some fit
        with pytest.MonkeyPatch.context() as patch:
            found[budget] = steps_on_devices(patch, budget)
    formed = {budget: formed for budget, (formed, _) in found.items()}
    assert formed[0] == set()
    assert formed[0] < formed[1000] < formed[2**27]
    assert len(formed[2**27]) == 3
    for one, other in zip(*(jax.tree.leaves(found[k][1]) for k in (0, 2**27)), strict=True):
        assert relative_error(one, other) <= 1e-9  # behind a solve


@x64
def test_too_large_gradients_are_not_kept():
    spec = make_case("conv strided").layers()["strided"]
    _, stats = make_case("conv strided").grads_and_stats()
    captures, shape = stats.layers["strided"], (spec.in_dim, spec.out_dim)
    numbers = 13 * spec.in_dim * spec.out_dim
    assert by_kind.numbers_formed_once(spec, captures, shape) == numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_kind, "_FORMED", numbers - 1)
        assert by_kind.numbers_formed_once(spec, captures, shape) == 0


# --- curvature from a part of the batch --------------------------------------------------------


def curvature_of_some(name, number, **options):
    case = make_case(name)
    grads, stats = case.grads_and_stats()
    tx = tekfac.scale_by_tekfac(case.layers(), statistics_examples=number, **options)
    _, state = jax.jit(lambda g, s: tx.update(g, tx.init(case.params), stats=s))(grads, stats)
    return tekfac.curvature(state)[case.path]


@pytest.mark.slow
@x64
@pytest.mark.parametrize("name", ["dense", "dense positions", "conv strided"])
@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_curvature_of_some_examples(name, number):
    """Φ, Ψ, δ and Θ are those of the chosen examples' own gradients."""
    g = per_example_matrices(name)
    stride = len(g) // number
    g = g[::stride][:number]
    found = curvature_of_some(name, number)
    phi, psi = (np.einsum(e, g, g) for e in ("nio,njo->ij", "nio,nip->op"))
    assert relative(found.phi, phi / np.trace(phi)) <= EXACT
    assert relative(found.psi, psi / np.trace(psi)) <= EXACT
    assert float(found.delta) == pytest.approx(np.trace(phi) / number, rel=EXACT)
    rotated = np.einsum("ij,nio,op->njp", found.q_phi, g, found.q_psi)
    assert relative(found.theta, (rotated**2).mean(axis=0)) <= EXACT


@pytest.mark.slow
@x64
@pytest.mark.parametrize("number", [13, 100])
def test_all_examples_are_no_part(number):
    some, whole = curvature_of_some("conv strided", number), curvature_of_some("conv strided", None)
    for one, other in zip(*map(jax.tree.leaves, (some, whole)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@x64
def test_a_batch_filled_up_at_its_end_counts_the_same_share():
    """Of 12 examples 6 only fill up; every second one is taken: 3 of those that count."""
    case = make_case("dense")

    def loss(params, x, y, weights):
        return jnp.sum(case.losses(params, x, y) * weights) / 6

    x, y = (jnp.concatenate([z[:6], z[:6]]) for z in (case.x, case.y))
    weights = jnp.repeat(jnp.asarray([1.0, 0.0]), 6)
    layers = tekfac.find_layers(loss, case.params, x, y, weights)
    fn = tekfac.value_grad_and_stats(loss, layers, reduction=6, examples=6)
    _, grads, stats = fn(case.params, x, y, weights)
    tx = tekfac.scale_by_tekfac(layers, statistics_examples=6)
    _, state = tx.update(grads, tx.init(case.params), stats=stats)
    found = tekfac.curvature(state)[case.path]
    g = per_example_matrices("dense")[[0, 2, 4]]
    assert float(found.delta) == pytest.approx((g**2).sum() / 3, rel=EXACT)


@pytest.mark.slow
@needs_devices
@x64
@pytest.mark.timeout(240)
def test_some_examples_of_every_device():
    """Two of four on each of four devices are every second one of sixteen."""
    on_devices = Network(statistics_examples=2).on_mesh(mesh_of(4))
    assert_same(on_devices, Network(statistics_examples=8).on_one_device(), 1e-10)


@x64
@pytest.mark.parametrize("number", [0, -1, 1.5, True, "half"])
def test_numbers_of_examples_out_of_range(number):
    with pytest.raises(ValueError, match=r"statistics_examples must be .*1 or more.* got"):
        tekfac.scale_by_tekfac(make_case("dense").layers(), statistics_examples=number)


@x64
def test_reduced_statistics_are_of_the_whole_batch():
    case = make_case("dense")
    layers = case.layers()

    def loss(params, x, y):
        return case.losses(params, x, y).mean()

    tx = tekfac.scale_by_tekfac(layers, statistics_examples=2)
    state = tx.init(case.params)
    fn = tekfac.value_grad_and_stats(loss, layers, mode="reduced")
    _, grads, stats = fn(case.params, case.x, case.y, opt_state=state)
    with pytest.raises(ValueError, match="is for raw statistics"):
        tx.update(grads, state, stats=stats)
