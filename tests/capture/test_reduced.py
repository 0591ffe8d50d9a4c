"""Statistics contracted in the backward pass equal the sums of the raw ones, in less memory."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature.by_kind import factors_of, rescaling_of
from tekfac_jax._curvature.chunks import sum_over_examples
from tests.capturing import Net, losses_of, randn, random_params, relative_error, x64_standard
from tests.models import MODELS, SENTENCES
from tests.oracles import SCALE_BY

EXACT = 1e-10
_NAMES = (
    "MLP", "depthwise-separable CNN", "ViT", "U-Net", "LSTM language model", "ensemble by vmap",
    "decoder-only transformer, scan and remat",
)  # fmt: skip


class Case:
    def __init__(self, name="MLP"):
        build, shape, _ = MODELS[name]
        model = Net(build)
        self.x = randn(*shape) if shape != SENTENCES else batch_of_words(shape)
        self.params = random_params(model, self.x)
        self.losses = lambda params, x: losses_of(model.apply({"params": params}, x))
        self.layers = tekfac.find_layers(self.loss, self.params, self.x)

    def loss(self, params, x):
        return self.losses(params, x).mean()

    def function(self, **options):
        return tekfac.value_grad_and_stats(self.loss, self.layers, **options)

    def reduced(self, **options):
        return self.function(mode="reduced", **options)


def batch_of_words(shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 7, shape))


@pytest.mark.slow
@x64_standard
@pytest.mark.parametrize(
    ("name", "factors"),
    [(name, "exact") for name in _NAMES]
    + [("MLP", "plain"), ("U-Net", "location"), ("LSTM language model", "plain")],
)
def test_sums_are_those_of_the_raw_statistics(name, factors):
    """Includes layers that are called several times, and recurrent layers."""
    case = Case(name)
    tx = tekfac.scale_by_tekfac(case.layers, factors="location")

    @jax.jit
    def both(params, x):
        value, grads, raw = case.function()(params, x)
        _, state = tx.update(grads, tx.init(params), stats=raw)  # for a basis
        expected = {}
        for path, spec in case.layers.items():
            basis = state.layers[path].q_phi, state.layers[path].q_psi
            contractions = factors_of(spec, factors), rescaling_of(spec, *basis)
            (phi, psi), (theta, rest) = (
                sum_over_examples(c, spec, raw.layers[path], raw.scale, jnp.float64)
                for c in contractions
            )
            expected[path] = tekfac.Reduced(phi, psi, theta, rest)
        reduced = case.reduced(factors=factors)(params, x, opt_state=state)
        return (value, grads, expected), reduced

    (value, grads, expected), actual = both(case.params, case.x)
    assert relative_error(actual[0], value) <= EXACT
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), actual[1], grads)
    assert actual[2].examples == len(case.x)
    for path in case.layers:
        for a, b in zip(actual[2].layers[path], expected[path], strict=True):
            np.testing.assert_allclose(a, b, rtol=EXACT, atol=EXACT * np.abs(b).max(), err_msg=path)


def by_hand(function, params, x, state, count):
    """Value, gradient and statistics of micro-batches, summed in a loop."""
    parts = [function(params, part, opt_state=state) for part in jnp.split(x, count)]
    total = parts[0]
    for part in parts[1:]:
        total = jax.tree.map(jnp.add, total, part)
    value, grads, stats = total
    return value / count, jax.tree.map(lambda g: g / count, grads), stats


def by_optax(function, params, x, state, count):
    """The same by `optax.microbatch`."""

    def of_part(x):
        return function(params, x, opt_state=state)

    accumulated = optax.microbatching.microbatch(
        of_part, argnums=0, microbatch_size=len(x) // count,
        accumulator=optax.microbatching.AccumulationType.SUM,
    )  # fmt: skip
    value, grads, stats = accumulated(x)
    return value / count, jax.tree.map(lambda g: g / count, grads), stats


@pytest.mark.slow
@x64_standard
@pytest.mark.parametrize("accumulate", [by_hand, by_optax])
@pytest.mark.parametrize("name", ["MLP", "decoder-only transformer, scan and remat"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, accumulate):
    case = Case(name)
    x = jnp.concatenate([case.x, case.x[::-1] if "MLP" not in name else -case.x])
    tx = tekfac.scale_by_tekfac(case.layers, factor_interval=1, damping=0.1)
    function = case.reduced()

    def steps(gradient):
        state, updates = tx.init(case.params), None
        for _ in range(3):
            _, grads, stats = gradient(state)
            updates, state = jax.jit(tx.update)(grads, state, stats=stats)
        return updates, tekfac.curvature(state)

    whole = steps(lambda state: jax.jit(function)(case.params, x, opt_state=state))
    parts = steps(jax.jit(lambda state: accumulate(function, case.params, x, state, 2)))
    for path in case.layers:
        for field in ("delta", "phi", "psi"):
            a, b = (getattr(side[1][path], field) for side in (parts, whole))
            assert relative_error(a, b) <= EXACT, (path, field)
    for a, b in zip(jax.tree.leaves(parts[0]), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALE_BY)
def test_update_with_reduced_statistics(name):
    """Θ exists from the second step on, measured in the basis of the first."""
    case = Case()
    measured = name in ("tekfac", "ekfac")
    factors = "plain" if name in ("ekfac", "kfac") else "exact"
    options = {"damping": 0.1, "factor_interval": 1, "eigenbasis_interval": 1}
    tx = SCALE_BY[name](case.layers, rescaling_interval=1, **options)
    function = jax.jit(case.reduced(factors=factors))
    state, updates, expected = tx.init(case.params), None, None
    for step in range(3):
        _, grads, stats = function(case.params, case.x, opt_state=state)
        updates, state = jax.jit(tx.update)(grads, state, stats=stats)
        valid = step > 0 or not measured
        changed = np.abs(updates["Dense_0"]["kernel"] - grads["Dense_0"]["kernel"]).max() > 1e-6
        assert changed == valid
    # With the same batch at each step, the result is that of raw statistics.
    raw_state = tx.init(case.params)
    for _ in range(3):
        _, grads, stats = case.function()(case.params, case.x)
        expected, raw_state = jax.jit(tx.update)(grads, raw_state, stats=stats)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_running_rescaling_with_reduced_statistics():
    """Θ comes from the gradient, and the caller gives its batch size."""
    case = Case()
    tx = tekfac.scale_by_tekfac(case.layers, rescaling="running", damping=0.1)
    _, grads, raw = case.function()(case.params, case.x)
    _, _, reduced = case.reduced()(case.params, case.x)
    expected, _ = tx.update(grads, tx.init(case.params), stats=raw)
    size = len(case.x)
    actual, _ = tx.update(grads, tx.init(case.params), stats=reduced, batch_size=size)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("examples", [None, 2])
def test_raw_statistics_that_were_added_up_are_refused(examples):
    """Their sum is meaningless, even with `examples=`; the state reports it."""
    case = Case()
    _, grads, stats = case.function(examples=examples)(case.params, case.x)
    tx = tekfac.scale_by_tekfac(case.layers)
    updates, state = tx.update(
        grads, tx.init(case.params), stats=jax.tree.map(jnp.add, stats, stats)
    )
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    assert all(layer.failures > 0 for layer in state.layers.values())
    assert not any(layer.basis_valid for layer in state.layers.values())


def test_when_it_is_not_due_nothing_is_contracted():
    case = Case()
    tx = tekfac.scale_by_tekfac(case.layers, factor_interval=3, rescaling_interval=3)
    function = jax.jit(case.reduced())
    state, grads = tx.init(case.params), None
    for step in range(7):
        due = tekfac.stats_due(state)
        _, grads, stats = function(case.params, case.x, opt_state=state, when=due)
        assert float(stats.examples) == (len(case.x) if due else 0)
        assert all(
            bool(leaf.any()) == bool(due) for leaf in jax.tree.leaves(stats.layers) if leaf.ndim
        ) or (
            step == 0  # without a basis Θ is zero
        )
        updates, state = jax.jit(tx.update)(grads, state, stats=stats)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    # If a refresh is due but nothing was contracted, the curvature stays as it is.
    nothing = function(case.params, case.x, opt_state=state, when=False)[2]
    before = state._replace(count=jnp.int32(6))
    _, after = jax.jit(tx.update)(grads, before, stats=nothing)
    for field in ("phi", "psi", "theta", "factor_weight", "failures"):
        for path in case.layers:
            np.testing.assert_array_equal(
                getattr(after.layers[path], field), getattr(before.layers[path], field)
            )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(4 * x.shape[-1])(x)
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


def test_memory_of_a_deep_scan():
    """Sixteen layers with remat: raw statistics undo its saving, reduced ones do not."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
                length=16,
            )  # fmt: skip
            return blocks()(x, None)[0]

    model, x = Deep(), randn(64, 16, 32)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    state = tekfac.scale_by_tekfac(layers).init(params)

    def bytes_of(function, *args, **kwargs):
        compiled = jax.jit(function).lower(*args, **kwargs).compile().memory_analysis()
        return compiled.temp_size_in_bytes + compiled.output_size_in_bytes

    plain = bytes_of(jax.value_and_grad(loss), params, x)
    raw = bytes_of(tekfac.value_grad_and_stats(loss, layers), params, x)
    function = tekfac.value_grad_and_stats(loss, layers, mode="reduced")
    reduced = bytes_of(function, params, x, opt_state=state)
    # Reduced statistics are as large as the curvature; that much they need in any case.
    statistics = sum(u["factors"] + u["rescaling"] for u in tekfac.memory_usage(state).values())
    assert raw > 3 * plain
    assert reduced - statistics <= 1.5 * plain


def test_wrong_statistics_are_refused():
    case = Case()
    tx = tekfac.scale_by_tekfac(case.layers)
    state = tx.init(case.params)
    _, grads, stats = case.reduced()(case.params, case.x)
    with pytest.raises(ValueError, match=r"lack Θ.*opt_state="):
        tx.update(grads, state, stats=stats)

    def update(tx):
        tx.update(grads, tx.init(case.params), stats=stats)

    update(tekfac.scale_by_tkfac(case.layers))
    for scale_by in (tekfac.scale_by_kfac, tekfac.scale_by_ekfac):
        with pytest.raises(
            ValueError, match=r'hold "exact" factors.*needs "plain".*factors="plain"'
        ):
            update(scale_by(case.layers))
    with pytest.raises(ValueError, match="batch_size="):
        update(tekfac.scale_by_tekfac(case.layers, rescaling="running"))
    other = Case("CNN")
    with pytest.raises(ValueError, match="opt_state does not fit the layers: The state lacks"):
        other.reduced()(other.params, other.x, opt_state=state)
    with pytest.raises(ValueError, match="no state of scale_by_tekfac"):
        case.reduced()(case.params, case.x, opt_state=optax.sgd(0.1).init(case.params))
    tx = tekfac.scale_by_tekfac(other.layers)
    with pytest.raises(ValueError, match=r"other layers.*unknown \['Dense_1'"):
        tx.update(other.params, tx.init(other.params), stats=stats)
    with pytest.raises(ValueError, match='mode must be one of "raw", "reduced"'):
        case.function(mode="summed")
    with pytest.raises(ValueError, match='factors must be one of "exact", "location", "plain"'):
        case.reduced(factors="A")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("theta", lambda x: x.mT, r"theta of shape \(\d+, \d+\), but the layer and its state"),
        ("theta", lambda x: {}, "a dict for theta instead of an array"),
        ("rest", lambda x: x[None], r"rest of shape \(1,\), but the layer"),
        ("psi", lambda x: x[:-1], r"psi of shape \(\d+, \d+\), but the layer"),
        ("phi", lambda x: x[0], r"phi of shape \(\d+,\), but the layer"),
    ],
)
def test_reduced_statistics_of_another_shape_are_refused(field, value, says):
    case = Case()
    tx = tekfac.scale_by_tekfac(case.layers)
    state = tx.init(case.params)
    _, grads, stats = case.reduced()(case.params, case.x, opt_state=state)
    path = next(iter(case.layers))
    layer = stats.layers[path]
    broken = layer._replace(**{field: value(getattr(layer, field))})
    stats = dataclasses.replace(stats, layers={**stats.layers, path: broken})
    with pytest.raises(ValueError, match=rf"stats of layer '{path}' have .*{says}"):
        tx.update(grads, state, stats=stats)


def test_reduced_statistics_without_a_number_of_examples_are_refused():
    case = Case()
    tx = tekfac.scale_by_tekfac(case.layers)
    state = tx.init(case.params)
    _, grads, stats = case.reduced()(case.params, case.x, opt_state=state)
    with pytest.raises(ValueError, match=r"scalar arrays of real numbers.*\[None\]"):
        tx.update(grads, state, stats=dataclasses.replace(stats, examples=None))
