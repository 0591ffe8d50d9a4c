"""The examples that count: curvature from part of the batch, and batches with fillers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tests.capturing import x64
from tests.oracles import make_case, per_example_matrices, relative
from tests.sharing import Network, assert_same, mesh_of, needs_devices

EXACT = 1e-12


# --- curvature from part of the batch ------------------------------------------------------------


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
    """Of 12 examples 6 are fillers; every second one is taken, so 3 that count."""
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
    """Two of four examples on each of four devices are every second one of sixteen."""
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


# --- examples that do not count ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sibling", ["kfac", "ekfac"])
def test_plain_factors_and_examples_that_do_not_count(sibling):
    """A would include the masked examples, so the update counts a failure instead."""
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
