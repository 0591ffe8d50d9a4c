"""A basis of few columns, with Θ in them and its mean outside, against dense operators."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tekfac_jax as tekfac
from tekfac_jax._curvature.dense import squared_norms
from tekfac_jax._curvature.eigenbasis import outside, precondition, rotate, transport
from tests import oracles
from tests.capturing import Net, losses_of, random_params, relative_error, x64, x64_standard
from tests.oracles import CASE_NAMES, SCALE_BY, make_case, per_example_matrices, relative
from tests.sharing import Network, assert_same, mesh_of, needs_devices

EXACT = 1e-12
sizes = st.integers(1, 7)
every_case = pytest.mark.parametrize("name", CASE_NAMES)
every_sibling = pytest.mark.parametrize("sibling", SCALE_BY)


class Operator:
    """A random operator on (i, o) matrices, with r and p columns."""

    def __init__(self, i, o, r, p, seed):
        rng = np.random.default_rng(seed)
        r, p = min(i, r), min(o, p)
        self.q = tuple(
            jnp.asarray(oracles.random_orthogonal(seed + k, d)[:, :n])
            for k, (d, n) in enumerate([(i, r), (o, p)])
        )
        self.theta = jnp.asarray(rng.uniform(0.1, 2, size=(r, p)))
        self.rest = jnp.asarray(rng.uniform(0.1, 2) * (i * o - r * p))
        self.g = jnp.asarray(rng.normal(size=(i, o)))

    def dense(self):
        return dense(*self.q, self.theta, outside(self.theta, self.rest, self.q))


def dense(q_phi, q_psi, theta, perp):
    """Q Θ Qᵀ + θ⊥ (I − Q Qᵀ), row-major."""
    q = np.kron(q_phi, q_psi)
    return (q * (np.ravel(theta) - float(perp))) @ q.T + float(perp) * np.eye(len(q))


# --- pure functions --------------------------------------------------------------------------


@x64
@settings(deadline=None, max_examples=40)
@given(i=sizes, o=sizes, r=sizes, p=sizes, seed=st.integers(0, 99))
def test_update_is_the_dense_solve(i, o, r, p, seed):
    operator = Operator(i, o, r, p, seed)
    damping = jnp.float64(0.1)
    actual = jax.jit(precondition)(operator.g, *operator.q, operator.theta, operator.rest, damping)
    damped = operator.dense() + 0.1 * np.eye(i * o)
    expected = np.linalg.solve(damped, np.ravel(operator.g)).reshape(i, o)
    assert relative(actual, expected) <= EXACT


@x64
@settings(deadline=None, max_examples=40)
@given(i=sizes, o=sizes, r=sizes, p=sizes, seed=st.integers(0, 99))
def test_transport_is_the_diagonal_of_the_dense_operator(i, o, r, p, seed):
    old, new = Operator(i, o, r, p, seed), Operator(i, o, r, p, seed + 1000)
    theta, rest = jax.jit(transport)(old.theta, old.rest, old.q, new.q)
    q = np.kron(*new.q)
    assert relative(np.ravel(theta), np.diag(q.T @ old.dense() @ q)) <= EXACT
    assert float(theta.sum() + rest) == pytest.approx(np.trace(old.dense()), rel=EXACT)
    assert float(theta.min()) > 0
    assert float(rest) >= 0


@x64
@settings(deadline=None, max_examples=30)
@given(n=sizes, t=st.integers(1, 9), i=sizes, o=sizes, seed=st.integers(0, 99))
def test_squared_norms_by_either_way(n, t, i, o, seed):
    rng = np.random.default_rng(seed)
    a, u = rng.normal(size=(n, t, i)), rng.normal(size=(n, t, o))
    g = np.einsum("nti,nto->nio", a, u)
    assert relative(jax.jit(squared_norms)(a, u), (g**2).sum()) <= EXACT


@x64
@settings(deadline=None, max_examples=30)
@given(i=sizes, o=sizes, r=sizes, p=sizes, seed=st.integers(0, 99))
def test_either_side_may_be_rotated_first(i, o, r, p, seed):
    operator = Operator(i, o, r, p, seed)
    expected = np.asarray(operator.q[0]).T @ np.asarray(operator.g) @ np.asarray(operator.q[1])
    assert relative(jax.jit(rotate)(operator.g, *operator.q), expected) <= EXACT


# --- curvature of networks -------------------------------------------------------------------


@functools.cache
def truncated(name, sibling="tekfac", rank=2, **options):
    update, state = oracles.one_update(make_case(name), sibling, basis_rank=rank, **options)
    return update, state, tekfac.curvature(state)[make_case(name).path]


@pytest.mark.slow
@x64
@every_case
@every_sibling
def test_what_a_network_holds(name, sibling):
    """The trace is that of F, Θ is its diagonal in the columns, and θ⊥ is the mean of the rest."""
    _, state, found = truncated(name, sibling)
    whole = oracles.curvature_of(name, sibling)
    (i, o), (r, p) = whole.theta.shape, found.theta.shape
    assert (r, p) == (min(i, 2), min(o, 2))
    assert found.q_phi.shape == (i, r)
    assert found.q_psi.shape == (o, p)
    total = float(whole.theta.sum())
    held = dense(found.q_phi, found.q_psi, found.theta, found.theta_rest)
    assert np.trace(held) == pytest.approx(total, rel=EXACT)
    order = [np.argsort(np.diag(q.T @ f @ q))[-n:] for q, f, n in
             [(whole.q_phi, whole.phi, r), (whole.q_psi, whole.psi, p)]]  # fmt: skip
    assert relative(np.sort(np.ravel(found.theta)),
                    np.sort(np.ravel(whole.theta[np.ix_(*order)]))) <= 1e-9  # fmt: skip
    share = float(found.theta.sum()) / total
    path = make_case(name).path
    assert float(tekfac.diagnostics(state)[f"{path}/kept"]) == pytest.approx(share, rel=1e-9)
    assert float(tekfac.diagnostics(state)[f"{path}/trace"]) == pytest.approx(total, rel=1e-9)


@pytest.mark.sampled
@x64
@every_case
def test_the_mean_is_the_best_scalar(name):
    """No other scalar than θ⊥ is nearer to the Fisher block; fewer columns are worse."""
    _, _, found = truncated(name)
    f = oracles.fisher(per_example_matrices(name))

    def error(perp):
        return np.linalg.norm(f - dense(found.q_phi, found.q_psi, found.theta, perp))

    best = error(found.theta_rest)
    for factor in (0.9, 1.1):
        assert error(factor * float(found.theta_rest)) > best
    whole = oracles.curvature_of(name)
    assert best >= np.linalg.norm(f - oracles.operator(whole)) - 1e-12


@pytest.mark.sampled
@x64
@every_case
@pytest.mark.parametrize("pair", [("tekfac", "tkfac"), ("ekfac", "kfac")])
def test_what_stays_of_the_theorem(name, pair):
    """‖F−F̂‖² = ‖F‖² − ‖Θr‖² − (IO−rp)θ⊥², so no other diagonal or product is nearer."""
    measured, product = (truncated(name, sibling)[2] for sibling in pair)
    f = oracles.fisher(per_example_matrices(name))

    def error(found, theta):
        return np.linalg.norm(f - dense(found.q_phi, found.q_psi, theta, found.theta_rest))

    theta, perp = np.asarray(measured.theta), float(measured.theta_rest)
    best, outside = error(measured, theta), len(f) - theta.size
    expected = np.linalg.norm(f) ** 2 - (theta**2).sum() - outside * perp**2
    assert best**2 == pytest.approx(expected, rel=1e-10)
    other = theta * np.random.default_rng(0).uniform(0.8, 1.2, size=theta.shape)
    assert error(measured, other) > best
    assert error(product, product.theta) >= best - EXACT


@pytest.mark.sampled
@x64
@every_case
def test_bounds_of_an_update(name):
    """‖ΔW‖ ≤ ‖G‖/λ and ⟨G, ΔW⟩ > 0; with trace damping, c times the loss gives 1/c the update."""
    case = make_case(name)
    grads, stats = case.grads_and_stats()
    g = np.asarray(oracles.matrix(grads[case.path]))
    update, state, _ = truncated(name, damping="trace", trace_floor=0.0, fc_damping="own")
    damping = float(tekfac.diagnostics(state)[f"{case.path}/damping"])
    assert np.linalg.norm(update) <= np.linalg.norm(g) / damping
    assert (update * g).sum() > 0
    scaled = stats._replace(scale=stats.scale * 3)
    larger = jax.tree.map(lambda x: 3 * x, grads)
    options = {"basis_rank": 2, "damping": "trace", "trace_floor": 0.0, "fc_damping": "own"}
    other, _ = oracles.one_update(case, "tekfac", larger, scaled, **options)
    assert relative(3 * other, update) <= 1e-9


@pytest.mark.sampled
@x64
@every_case
@pytest.mark.parametrize("damping", ["trace", 0.02])
def test_update_of_a_network_is_the_dense_solve(name, damping):
    options = {"damping": damping, "fc_damping": "own", "damping_scale": 0.5}
    update, _, found = truncated(name, **options)
    held = dense(found.q_phi, found.q_psi, found.theta, found.theta_rest)
    rule = max(np.trace(held), 0.01) / len(held) if damping == "trace" else damping
    grads, _ = make_case(name).grads_and_stats()
    g = np.asarray(oracles.matrix(grads[make_case(name).path]))
    expected = np.linalg.solve(held + 0.5 * rule * np.eye(len(held)), g.ravel())
    assert relative(update.ravel(), expected) <= 1e-10


@x64
@pytest.mark.parametrize("rank", [100, 1.0])
def test_all_columns_are_the_full_basis(rank):
    update, _, found = truncated("conv strided", rank=rank)
    expected, _ = oracles.one_update(make_case("conv strided"))
    np.testing.assert_array_equal(update, expected)
    assert float(found.theta_rest) == 0


@x64
def test_running_rescaling():
    """Θ is N times the squared mean gradient, in the columns and outside them."""
    case = make_case("dense")
    _, _, found = truncated("dense", rescaling="running")
    grads, _ = case.grads_and_stats()
    g, n = np.asarray(oracles.matrix(grads[case.path])), len(case.x)
    theta = n * (np.asarray(found.q_phi).T @ g @ np.asarray(found.q_psi)) ** 2
    assert relative(found.theta, theta) <= EXACT
    held = dense(found.q_phi, found.q_psi, found.theta, found.theta_rest)
    assert np.trace(held) == pytest.approx(n * (g**2).sum(), rel=EXACT)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1])(nn.LayerNorm()(x))), None


def words(ids):
    """Stacked layers, norms, and a table that is both read and attended."""
    table = nn.Embed(9, 6, name="table")
    blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return table.attend(blocks(name="blocks")(table(ids), None)[0])


def reader(ids):
    """A table that is only read, and a grouped convolution."""
    x = nn.Conv(6, (2,), feature_group_count=2, name="conv")(nn.Embed(9, 6, name="table")(ids))
    return nn.Dense(3)(jnp.tanh(x).reshape(len(x), -1))


@pytest.mark.slow
@x64_standard
@pytest.mark.parametrize("build", [words, reader])
def test_every_kind_of_layer_raw_and_reduced(build):
    """Traces are those of a full basis; reduced statistics give the result of raw ones."""
    model, ids = Net(build), jnp.asarray(np.random.default_rng(0).integers(0, 9, (7, 4)))
    params = random_params(model, ids)

    def loss(params, ids):
        return losses_of(model.apply({"params": params}, ids)).mean()

    layers = tekfac.find_layers(loss, params, ids, norm="unitwise")

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def states(rank, mode, params, ids):
        tx = tekfac.scale_by_tekfac(
            layers, basis_rank=rank, factor_interval=1, rescaling_interval=1, damping=0.1
        )
        fn = tekfac.value_grad_and_stats(loss, layers, mode=mode)
        state, updates = tx.init(params), None
        for _ in range(2):
            further = {"opt_state": state} if mode == "reduced" else {}
            _, grads, stats = fn(params, ids, **further)
            updates, state = tx.update(grads, state, params, stats=stats)
        return tekfac.curvature(state), updates, tekfac.diagnostics(state)

    raw, raw_updates, scalars = states(2, "raw", params, ids)
    reduced, reduced_updates, _ = states(2, "reduced", params, ids)
    _, _, whole_scalars = states(None, "raw", params, ids)
    for path, spec in layers.items():
        assert relative_error(scalars[f"{path}/trace"], whole_scalars[f"{path}/trace"]) <= 1e-10
        assert raw[path].theta.shape[-1] == min(2, spec.out_dim)
        assert relative_error(reduced[path].theta_rest + 1, raw[path].theta_rest + 1) <= 1e-10
        if spec.kind == "norm":
            assert float(scalars[f"{path}/kept"]) == 1
        else:
            assert float(scalars[f"{path}/kept"]) < 1
    for one, other in zip(*map(jax.tree.leaves, (reduced_updates, raw_updates)), strict=True):
        assert relative_error(one, other) <= 1e-9


@pytest.mark.slow
@needs_devices
@x64
@pytest.mark.timeout(240)
def test_on_a_mesh_it_is_one_device():
    network = Network(basis_rank=2)
    assert_same(network.on_mesh(mesh_of(4)), network.on_one_device(), 1e-10)


def test_only_the_kept_columns_are_stored():
    layers = make_layers(512, 256)
    state = jax.eval_shape(tekfac.scale_by_tekfac(layers, basis_rank="auto").init, None)
    sizes = tekfac.memory_usage(state)["layer_0"]
    assert sizes["eigenbasis"] == 4 * (512 * 64 + 256 * 64)
    assert sizes["rescaling"] == 4 * 64 * 64
    assert tekfac.check_state(state, layers) == ""
    assert "dimension" in tekfac.check_state(state, make_layers(512, 255))


def make_layers(i, o):
    spec = tekfac.LayerSpec(
        path="layer_0", kind="dense", kernel_shape=(i, o), contracted=1, use_bias=False,
        dtype="float32", axes=(-1,),
    )  # fmt: skip
    return tekfac.Layers((spec,))


@pytest.mark.parametrize(
    ("dims", "kept"), [((32, 32), (32, 32)), ((33, 33), (5, 9)), ((577, 64), (73, 16))]
)
def test_auto_keeps_small_sides_whole(dims, kept):
    state = tekfac.scale_by_tekfac(make_layers(*dims), basis_rank="auto").init(None)
    assert state.layers["layer_0"].theta.shape == kept


@pytest.mark.parametrize(
    ("rank", "max_dim", "kept"),
    [
        (None, 577, (577, 256)), (None, 576, (73, 256)), (None, 256, (73, 256)),
        (None, 100, (73, 64)), (None, 8, (73, 64)), ("auto", 10_000, (73, 64)),
        (7, 10_000, (7, 7)), (None, None, (577, 256)),
    ],
)  # fmt: skip
def test_only_sides_above_the_limit_are_truncated(rank, max_dim, kept):
    state = tekfac.scale_by_tekfac(make_layers(577, 256), basis_rank=rank, max_dim=max_dim).init(
        None
    )
    assert state.layers["layer_0"].theta.shape == kept


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_limits_out_of_range(limit):
    with pytest.raises(ValueError, match=r"max_dim must be the largest side.*got"):
        tekfac.scale_by_tekfac(make_layers(4, 4), max_dim=limit)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "all"])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=r"basis_rank must be None.*\"auto\".*got"):
        tekfac.scale_by_tekfac(make_layers(4, 4), basis_rank=rank)


@needs_devices
def test_a_divided_state_keeps_all_columns():
    with pytest.raises(ValueError, match="cannot be combined"):
        tekfac.scale_by_tekfac(make_layers(4, 4), basis_rank=2, mesh=mesh_of(2), shard_state=True)
