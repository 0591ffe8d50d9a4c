"""Embeddings against brute force: dense per-example gradients, Fisher matrices and solves."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tests import oracles
from tests.capturing import losses_of, random_params, relative_error, x64
from tests.oracles import SCALE_BY, relative

EXACT = 1e-12
ROWS, WIDTH = 7, 4
SHAPES = {
    "words": (9,), "sentences": (6, 5), "pages": (5, 2, 3), "ensemble": (6, 4),
    "tied": (6, 5), "tied words": (9,), "tied ensemble": (6, 4), "head alone": (6, 3),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", SHAPES)
every_sibling = pytest.mark.parametrize("sibling", SCALE_BY)


class Reader(nn.Module):
    """Looks words up and applies a nonlinearity; sums over positions, if there are any."""

    @nn.compact
    def __call__(self, ids):
        x = jnp.tanh(nn.Embed(ROWS, WIDTH, name="words")(ids) ** 2 + 0.3)
        x = x.reshape(len(ids), -1, WIDTH)
        weights = jnp.cos(jnp.arange(x.shape[1], dtype=x.dtype))
        return nn.Dense(3, name="head")((x * weights[:, None]).sum(axis=1))


class Writer(nn.Module):
    """Attends to a table (a score for each row) that is also read, unless it is only a head."""

    reads: bool = True

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(ROWS, WIDTH, name="words")
        dtype = jnp.result_type(float)
        x = table(ids) if self.reads else jax.nn.one_hot(ids, WIDTH, dtype=dtype)
        x = jnp.tanh(nn.Dense(WIDTH, name="inner")(jnp.tanh(x**2 + 0.3)))
        return table.attend(x)


class Several(nn.Module):
    """Two networks, each with its own table."""

    kind: type

    @nn.compact
    def __call__(self, ids):
        both = nn.vmap(
            self.kind, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
            axis_size=2,
        )  # fmt: skip
        return both(name="both")(ids).sum(axis=0)


class Case:
    """A network, one of its embeddings, and that embedding's G_n, [N, *lead, rows, width]."""

    def __init__(self, name):
        shape = SHAPES[name]
        kind = Writer if "tied" in name else Reader
        self.model: nn.Module = Several(kind) if "ensemble" in name else kind()
        if name == "head alone":
            self.model = Writer(reads=False)
        self.path = "both/words" if "ensemble" in name else "words"
        # Row 6 never occurs; row 0 occurs often, and twice in one example.
        self.ids = np.random.default_rng(0).integers(0, ROWS - 1, shape) % 4
        self.ids[-1] = 5
        self.params = random_params(self.model, self.ids)
        self.layers = tekfac.find_layers(self.loss, self.params, self.ids)

    def losses(self, params, ids):
        return losses_of(self.model.apply({"params": params}, ids))

    def loss(self, params, ids):
        return self.losses(params, ids).mean()

    def table(self, tree) -> Any:
        for key in self.path.split("/"):
            tree = tree[key]
        return tree["embedding"]

    def per_example(self):
        def one(params, ids):
            return self.losses(params, ids[None])[0]

        grads = jax.vmap(jax.grad(one), in_axes=(None, 0))(self.params, self.ids)
        return np.asarray(self.table(grads))

    def plain_factors(self):
        """KFAC's A (diagonal) and U, over all uses of the table.

        Where the table is read, the row gets a 1 and the columns the gradient; where it is
        attended, the row gets the gradient of its score and the columns the query.
        """
        _, _, stats = tekfac.value_grad_and_stats(self.loss, self.layers)(self.params, self.ids)
        lead, n = self.layers[self.path].lead, len(self.ids)
        phi, psi, positions = 0.0, 0.0, 0
        for a, u in stats.layers[self.path]:
            u = np.asarray(u) * float(stats.scale)
            if u.shape[-1] == WIDTH:
                rows, columns = np.eye(ROWS)[np.asarray(a).astype(int)], u
            else:
                rows, columns = u, np.asarray(a)
            rows, columns = (v.reshape(*lead, -1, v.shape[-1]) for v in (rows, columns))
            phi = phi + (rows**2).sum(axis=-2) / n
            psi = psi + np.einsum("...ti,...tj->...ij", columns, columns) / n
            positions += rows.shape[-2] // n
        return phi, psi / positions

    def update(self, sibling="tekfac", layers=None, **options):
        """One update: the table's update, gradient and curvature."""
        layers = self.layers if layers is None else layers
        _, grads, stats = jax.jit(tekfac.value_grad_and_stats(self.loss, layers))(
            self.params, self.ids
        )
        tx = SCALE_BY[sibling](layers, **options)
        updates, state = jax.jit(lambda g, s: tx.update(g, tx.init(self.params), stats=s))(
            grads, stats
        )
        return self.table(updates), self.table(grads), tekfac.curvature(state)[self.path]


@pytest.mark.sampled
@x64
@every_case
def test_embeddings_are_captured(name):
    case = Case(name)
    assert case.layers[case.path].kind == "embed"
    assert case.layers[case.path].attended == (
        name not in ("words", "sentences", "pages", "ensemble")
    )
    assert not case.layers.uncovered
    errors = tekfac.check_capture(case.loss, case.layers, case.params, case.ids)
    assert max(errors.values()) <= EXACT


@pytest.mark.sampled
@x64
@every_case
@every_sibling
def test_curvature_is_that_of_the_dense_gradients(name, sibling):
    case = Case(name)
    _, _, actual = case.update(sibling)
    assert actual.q_phi is None
    g = np.moveaxis(case.per_example(), 0, -3)  # [*lead, N, rows, width]
    q = np.asarray(actual.q_psi)
    delta = (g**2).sum(axis=(-2, -1)).mean(axis=-1)
    if sibling in ("tekfac", "tkfac"):
        phi = (g**2).sum(axis=-1).mean(axis=-2)
        psi = np.einsum("...nvo,...nvp->...op", g, g) / len(case.ids)
        assert relative(actual.delta, delta) <= EXACT
        assert relative(actual.phi, phi / delta[..., None]) <= EXACT
        assert relative(actual.psi, psi / delta[..., None, None]) <= EXACT
        product = delta[..., None, None]
    else:
        if case.layers[case.path].attended:  # A and U are compared with the oracle below
            phi, psi = case.plain_factors()
            counts = phi / phi.sum(axis=-1, keepdims=True)
            assert (
                relative(actual.psi, psi / np.trace(psi, axis1=-2, axis2=-1)[..., None, None])
                <= EXACT
            )
            total = phi.sum(axis=-1) * np.trace(psi, axis1=-2, axis2=-1)
            assert relative(actual.delta, total) <= EXACT
        else:
            counts = np.bincount(case.ids.ravel(), minlength=ROWS) / case.ids.size
        assert relative(actual.phi, np.broadcast_to(counts, actual.phi.shape)) <= EXACT
        product = np.asarray(actual.delta)[..., None, None]
    if sibling in ("tekfac", "ekfac"):
        theta = ((g @ q[..., None, :, :]) ** 2).mean(axis=-3)
    else:
        values = np.einsum("...op,...oq,...qp->...p", q, np.asarray(actual.psi), q)
        theta = product * np.asarray(actual.phi)[..., :, None] * values[..., None, :]
    assert relative(actual.theta, theta) <= EXACT


@pytest.mark.sampled
@x64
@every_case
def test_update_is_the_dense_solve(name):
    case = Case(name)
    direction, gradient, curvature = case.update(damping=0.1)
    tables = np.asarray(gradient).reshape(-1, ROWS, WIDTH)
    for i, gradient in enumerate(tables):
        theta = np.asarray(curvature.theta).reshape(-1, ROWS, WIDTH)[i]
        q = np.kron(np.eye(ROWS), np.asarray(curvature.q_psi).reshape(-1, WIDTH, WIDTH)[i])
        dense = (q * theta.ravel()) @ q.T + 0.1 * np.eye(ROWS * WIDTH)
        expected = np.linalg.solve(dense, gradient.ravel()).reshape(ROWS, WIDTH)
        assert relative(np.asarray(direction).reshape(-1, ROWS, WIDTH)[i], expected) <= EXACT


@pytest.mark.sampled
@x64
@every_case
def test_trace_is_that_of_the_fisher(name):
    """ΣΘ = δ = tr F with exact factors, and for one position also with location factors."""
    case = Case(name)
    trace = (case.per_example() ** 2).sum(axis=(-2, -1)).mean(axis=0)
    _, _, curvature = case.update()
    assert relative(curvature.theta.sum(axis=(-2, -1)), trace) <= EXACT
    _, _, curvature = case.update(factors="location")
    assert relative(curvature.theta.sum(axis=(-2, -1)), trace) <= EXACT
    if name == "words":
        assert relative(curvature.delta, trace) <= EXACT
    elif "tied" in name:  # a position that is read and one that is attended
        assert relative(curvature.delta, trace) > 1e-3
    else:
        assert relative(curvature.delta, trace) > 1e-3


@x64
@pytest.mark.parametrize("name", ["sentences", "tied"])
def test_rows_may_be_counted_from_the_end(name):
    case = Case(name)
    _, _, expected = case.update()
    case.ids[0] -= ROWS
    _, _, actual = case.update()
    for a, b in zip(actual, expected, strict=True):
        if a is not None:
            assert relative(a, b) <= EXACT


def test_nothing_is_as_large_as_the_square_of_the_rows():
    """With a vocabulary of 100,000 a square matrix would take 40 GB."""
    model = nn.Embed(100_000, 8)
    ids = jnp.arange(12).reshape(3, 4)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids))["params"]

    def loss(params, ids):
        return losses_of(model.apply({"params": params}, ids)).mean()

    layers = tekfac.find_layers(loss, params, ids)
    tx = tekfac.scale_by_tekfac(layers)

    def step(params, state, ids):
        _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, ids)
        return tx.update(grads, state, params, stats=stats)

    state = jax.eval_shape(tx.init, params)
    table = 4 * 100_000 * 8
    assert sum(tekfac.memory_usage(state)["~"].values()) < 1.3 * table
    assert layers["~"].state_bytes == sum(tekfac.memory_usage(state)["~"].values())
    compiled = jax.jit(step).lower(params, state, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * table


@pytest.mark.slow
def test_training_with_momentum_and_clip():
    """The ready optimizer treats the table like any captured layer."""
    case = Case("sentences")
    tx = tekfac.tekfac(0.1, case.layers, factor_interval=2, rescaling_interval=2)
    step = jax.jit(tekfac.value_grad_and_stats(case.loss, case.layers))
    params, state = case.params, tx.init(case.params)
    losses: list[float] = []
    updates: Any = None
    for _ in range(10):
        loss, grads, stats = step(params, case.ids)
        updates, state = tx.update(grads, state, params, stats=stats)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    labels = [leaf for leaf in jax.tree.leaves(tekfac.diagnostics(state)) if leaf.ndim == 0]
    assert len(labels) == len(tekfac.diagnostics(state))
    unnamed = np.asarray(case.table(updates))[ROWS - 1]
    assert not unnamed.any()


@pytest.mark.slow
@x64
@pytest.mark.parametrize("name", ["tied", "tied ensemble", "head alone"])
def test_reduced_statistics_of_a_tied_table(name):
    """Both uses are summed to the example's gradient before anything is squared."""
    case = Case(name)
    tx = tekfac.scale_by_tekfac(case.layers, factor_interval=1, rescaling_interval=1)

    @jax.jit
    def run(params, ids):
        fn = tekfac.value_grad_and_stats(case.loss, case.layers, mode="reduced")
        state = tx.init(params)
        for _ in range(2):
            _, grads, stats = fn(params, ids, opt_state=state)
            _, state = tx.update(grads, state, params, stats=stats)
        return state

    found = tekfac.curvature(run(case.params, case.ids))[case.path]
    _, _, expected = case.update()
    for one, other in zip(found, expected, strict=True):
        if one is not None and one.ndim != found.q_psi.ndim:
            assert relative(one, other) <= 1e-10
    assert relative(found.theta.sum(), expected.theta.sum()) <= 1e-10


@x64
def test_sampled_and_exact_fisher():
    """The exact Fisher of an embedding is the Gauss-Newton matrix's diagonal in its basis."""
    case = Case("sentences")
    likelihood = tekfac.Categorical()

    def predict(params, ids):
        return case.model.apply({"params": params}, ids)

    stats_fn = tekfac.fisher_stats(predict, case.layers, likelihood=likelihood, estimator="exact")
    stats = jax.jit(stats_fn)(case.params, case.ids)
    tx = tekfac.scale_by_tekfac(case.layers)
    grads = jax.grad(case.loss)(case.params, case.ids)
    _, state = jax.jit(lambda g, s: tx.update(g, tx.init(case.params), stats=s))(grads, stats)
    actual = tekfac.curvature(state)["words"]
    jacobian = np.asarray(case.table(jax.jacobian(predict)(case.params, case.ids)))
    p = np.asarray(jax.nn.softmax(predict(case.params, case.ids)))
    cov = np.einsum("nk,kl->nkl", p, np.eye(3)) - p[:, :, None] * p[:, None, :]
    rotated = jacobian @ np.asarray(actual.q_psi)
    theta = np.einsum("nkvo,nkl,nlvo->vo", rotated, cov, rotated) / len(p)
    assert relative_error(actual.theta, theta) <= 1e-10
    assert oracles.relative(actual.delta, theta.sum()) <= 1e-10
