"""Eigenbases that are updated from the previous one, against `eigh`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import tekfac_jax as tekfac
from tekfac_jax._curvature import decomposition
from tekfac_jax._curvature.decomposition import (
    TOLERANCE,
    eigenvectors,
    residual,
    starts_from_old_basis,
    updated_eigenvectors,
)
from tests import oracles
from tests.capturing import x64
from tests.oracles import make_case, one_update, relative
from tests.sharing import Network, assert_same, mesh_of, needs_devices

TRUE = jnp.array(True)
dims = st.sampled_from([3, 7, 12, 24])  # few shapes, since each is compiled
update = jax.jit(updated_eigenvectors)


def factor(values, seed):
    """A symmetric matrix with these eigenvalues, and its eigenvectors in ascending order."""
    q = oracles.random_orthogonal(seed, len(values))
    order = np.argsort(values)
    values, q = np.asarray(values, float)[order], q[:, order]
    return jnp.asarray((q * values) @ q.T), jnp.asarray(q)


def decaying(d, seed):
    return factor(np.exp(-5 * np.arange(d) / d), seed)


def turned(q, angle, seed):
    """The basis after a random rotation by about `angle` radians."""
    noise = np.random.default_rng(seed).normal(size=(len(q), len(q)))
    skew = angle * (noise - noise.T) / np.sqrt(2 * len(q))
    return jnp.asarray(scipy.linalg.expm(skew) @ np.asarray(q))


def count_calls(monkeypatch, name):
    """Counts the calls of a function of `jnp.linalg` at run time."""
    calls, function = [], getattr(jnp.linalg, name)

    def counted(*args, **options):
        jax.debug.callback(lambda: calls.append(args[0].shape))
        return function(*args, **options)

    monkeypatch.setattr(decomposition.jnp.linalg, name, counted)
    return calls


@pytest.mark.slow
@x64
@settings(deadline=None, max_examples=40)
@given(
    d=dims,
    share=st.sampled_from([0.1, 0.3, 0.6, 1.0]),
    angle=st.floats(0, 2),
    seed=st.integers(0, 99),
)
def test_an_update_is_a_basis_within_the_tolerance(d, share, angle, seed):
    """From any previous basis: orthonormal columns, ascending values, nearly the mass of `eigh`."""
    r = max(1, round(share * d))
    phi, q = decaying(d, seed)
    old = turned(q, angle, seed)[:, d - r :]
    new = update(phi, old, TRUE)
    assert relative(new.T @ new, np.eye(r)) <= 1e-10
    assert float(residual(phi, new)) <= TOLERANCE + 1e-12
    kept, best = (np.trace(np.asarray(b).T @ phi @ b) for b in (new, q[:, d - r :]))
    assert float(best) >= float(kept) - 1e-12
    # Each of the r directions may be off by the residual.
    assert float(kept) >= float(best) - r * TOLERANCE * float(jnp.linalg.norm(phi))


@x64
@pytest.mark.parametrize(("d", "r"), [(12, 12), (12, 4)])
def test_a_basis_that_still_fits_is_kept_to_the_bit(d, r, monkeypatch):
    phi, q = decaying(d, 0)
    old = turned(q, 0.001, 1)[:, d - r :]
    decomposed, orthogonalised = (count_calls(monkeypatch, name) for name in ("eigh", "qr"))
    assert 1e-5 < float(residual(phi, old)) < TOLERANCE
    new = updated_eigenvectors(phi, old, TRUE)
    jax.effects_barrier()
    np.testing.assert_array_equal(new, old)
    assert decomposed == orthogonalised == []


@pytest.mark.slow
@x64
@pytest.mark.parametrize(("d", "r"), [(40, 40), (40, 10)])
def test_a_basis_that_nearly_fits_costs_no_decomposition(d, r, monkeypatch):
    phi, q = decaying(d, 0)
    old = turned(q, 0.1, 1)[:, d - r :]
    assert float(residual(phi, old)) > TOLERANCE
    decomposed = count_calls(monkeypatch, "eigh")
    new = updated_eigenvectors(phi, old, TRUE)
    jax.effects_barrier()
    assert (d, d) not in decomposed
    assert float(residual(phi, new)) <= TOLERANCE
    values = np.sum(np.asarray(new) * np.asarray(phi @ new), axis=0)
    assert np.all(np.diff(values) > -TOLERANCE)


@x64
@pytest.mark.parametrize("r", [3, 12])
@pytest.mark.parametrize("valid", [True, False])
def test_where_passes_do_not_suffice_it_is_eigh(r, valid, monkeypatch):
    d = 12
    phi, _ = decaying(d, 0)
    old = jnp.asarray(oracles.random_orthogonal(5, d))[:, d - r :] * float(valid)
    monkeypatch.setattr(decomposition, "_PASSES", 0)
    new = updated_eigenvectors(phi, old, jnp.array(valid))
    np.testing.assert_array_equal(new, eigenvectors(phi)[:, d - r :])


@pytest.mark.slow
@x64
@settings(deadline=None, max_examples=20)
@given(d=st.sampled_from([6, 13, 24]), seed=st.integers(0, 99))
def test_a_large_eigenvalue_that_grows_outside_is_found(d, seed):
    """It is orthogonal to all kept columns, so that the old basis has a residual of zero."""
    r = d // 3
    phi, q = decaying(d, seed)
    old, other = q[:, d - r :], q[:, 0]
    grown = phi + 5 * jnp.outer(other, other)
    assert float(residual(grown, old)) < 1e-10
    new = update(grown, old, TRUE)
    assert float(jnp.linalg.norm(new.T @ other)) > 0.999


@x64
@pytest.mark.parametrize("r", [2, 6])
def test_extreme_factors(r):
    """Scales whose squares overflow, zero, and NaN."""
    phi, q = decaying(6, 0)
    old = q[:, 6 - r :]
    for scale in (1e30, 1e-30):
        scaled = (phi * scale).astype(jnp.float32)
        new = updated_eigenvectors(scaled, turned(q, 1.0, 1)[:, 6 - r :].astype("float32"), TRUE)
        cosines = np.sum(np.asarray(new) * np.asarray(q[:, 6 - r :]), axis=0)
        assert relative(np.abs(cosines), np.ones(r)) <= 0.05
    np.testing.assert_array_equal(updated_eigenvectors(0 * phi, old, TRUE), old)
    assert np.all(np.isnan(updated_eigenvectors(phi.at[0, 0].set(jnp.nan), old, TRUE)))


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_several_factors_one_by_one(lead):
    number, d, r = int(np.prod(lead)), 8, 3
    pairs = [decaying(d, seed) for seed in range(number)]
    phi = jnp.stack([p for p, _ in pairs]).reshape(*lead, d, d)
    old = jnp.stack([turned(q, 0.3 * k, k)[:, d - r :] for k, (_, q) in enumerate(pairs)])
    old, valid = old.reshape(*lead, d, r), jnp.arange(number).reshape(lead) > 0
    mine = jnp.arange(number).reshape(lead) != 1
    found = np.asarray(updated_eigenvectors(phi, old, valid, mine)).reshape(number, d, r)
    for k, (own, _) in enumerate(pairs):
        flat = updated_eigenvectors(own, old.reshape(-1, d, r)[k], valid.ravel()[k])
        assert relative(found[k] + 1, np.where(k == 1, 0, flat) + 1) <= 1e-12


@pytest.mark.parametrize(
    ("method", "dim", "rank", "expected"),
    [
        ("eigh", 1000, 10, False), ("subspace", 1000, 1000, True), ("subspace", 3, 3, True),
        ("subspace", 2, 1, False), ("auto", 1000, 125, True), ("auto", 1000, 1000, False),
        ("auto", 128, 16, False), ("auto", 1000, 501, False),
    ],
)  # fmt: skip
def test_when_the_basis_before_is_of_use(method, dim, rank, expected):
    assert starts_from_old_basis(dim, rank, method) is expected


# --- in a transformation -----------------------------------------------------------------------


@functools.cache
def states_of(name, eigenbasis, rank, steps=5):
    """The states after steps in which the curvature changes a little."""
    case = make_case(name)
    layers = case.layers()
    tx = tekfac.scale_by_tekfac(
        layers, factor_interval=1, eigenbasis_interval=1, rescaling_interval=1, damping=0.1,
        basis_rank=rank, eigenbasis=eigenbasis,
    )  # fmt: skip
    state, update, updates = tx.init(case.params), jax.jit(tx.update), None
    grads, stats = case.grads_and_stats(layers)
    for k in range(steps):
        captures = {
            path: tuple(c._replace(a=c.a * (1 + 0.02 * k * jnp.cos(c.a))) for c in own)
            for path, own in stats.layers.items()
        }
        updates, state = update(grads, state, stats=stats._replace(layers=captures))
    return updates, state


@pytest.mark.slow
@x64
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ["dense", "conv strided", "conv dilated no bias"])
def test_updated_bases_train_as_new_ones_do(name, rank):
    """The operators agree within the tolerance, their traces up to rounding."""
    path = make_case(name).path
    (updates, state), (other_updates, other) = (
        states_of(name, method, rank) for method in ("subspace", "eigh")
    )
    scalars, other_scalars = tekfac.diagnostics(state), tekfac.diagnostics(other)
    for layer in state.layers:
        for side in ("phi", "psi"):
            assert float(scalars[f"{layer}/{side}_residual"]) <= TOLERANCE + 1e-12
            assert float(other_scalars[f"{layer}/{side}_residual"]) <= 1e-9
        assert float(scalars[f"{layer}/trace"]) == pytest.approx(
            float(other_scalars[f"{layer}/trace"]), rel=1e-9
        )
        assert int(scalars[f"{layer}/failures"]) == 0
    one, two = (np.ravel(u[path]["kernel"]) for u in (updates, other_updates))
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert cosine > 0.99


@x64
def test_the_residual_grows_while_a_basis_is_held():
    case = make_case("conv strided")
    _, state = one_update(case)
    assert float(tekfac.diagnostics(state)[f"{case.path}/phi_residual"]) <= 1e-9
    moved = state.layers[case.path]
    moved = moved._replace(phi=moved.phi.at[0, 0].add(jnp.trace(moved.phi)))
    state = state._replace(layers=state.layers | {case.path: moved})
    assert float(tekfac.diagnostics(state)[f"{case.path}/phi_residual"]) > TOLERANCE


@pytest.mark.slow
@needs_devices
@x64
@pytest.mark.timeout(240)
@pytest.mark.parametrize("rank", [None, 2])
def test_on_a_mesh_it_is_one_device(rank):
    network = Network(basis_rank=rank, eigenbasis="subspace")
    assert_same(network.on_mesh(mesh_of(4)), network.on_one_device(), 1e-10)


@x64
def test_an_unknown_method():
    with pytest.raises(ValueError, match=r'eigenbasis must be one of "eigh", "subspace", "auto"'):
        tekfac.scale_by_tekfac(make_case("dense").layers(), eigenbasis="qr")
