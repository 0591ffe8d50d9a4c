"""Every public transform does what optax, Flax and orbax expect of one, and fails gracefully."""

import functools
import inspect
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import tekfac_jax as tekfac
from tekfac_jax._curvature.decomposition import eigenvectors
from tekfac_jax._optimizer import refresh
from tekfac_jax._state import recognise

LEARNING_RATE = 0.05
ROUNDING = 2e-4  # relative, float32, between two programs that compute the same
STEPS = 3

SCALE_BY = {
    "scale_by_tekfac": tekfac.scale_by_tekfac,
    "scale_by_tkfac": tekfac.scale_by_tkfac,
    "scale_by_ekfac": tekfac.scale_by_ekfac,
    "scale_by_kfac": tekfac.scale_by_kfac,
}
READY = {
    name: functools.partial(getattr(tekfac, name), LEARNING_RATE)
    for name in ("tekfac", "tkfac", "ekfac", "kfac")
}
FACTORIES = {**SCALE_BY, **READY}
OPTIONS = {
    "factor_interval": 2,
    "eigenbasis_interval": 1,
    "rescaling_interval": 2,
    "damping": 0.1,  # so that rounding errors stay small in float32
}
INTERVALS = tuple(name for name in OPTIONS if name.endswith("_interval"))
FACTORS = ("phi", "psi", "q_phi", "q_psi")

every_transform = pytest.mark.parametrize("name", FACTORIES)
every_scale_by = pytest.mark.parametrize("name", SCALE_BY)
every_ready = pytest.mark.parametrize("name", READY)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax itself mixes dtypes; `test_strict_promotion` is about ours."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(2, name="last", use_bias=False)(jnp.tanh(x))


class Case:
    """A network, its layers, and the gradient and statistics of one batch for each step."""

    def __init__(self):
        self.model = Model()
        xs = jax.random.normal(jax.random.key(0), (8, 6, 3), jnp.float32)
        self.params = self.model.init(jax.random.key(1), xs[0])["params"]
        self.layers = tekfac.find_layers(self.loss, self.params, xs[0])
        step = jax.jit(tekfac.value_grad_and_stats(self.loss, self.layers))
        self.batches = [step(self.params, x)[1:] for x in xs]

    def loss(self, params, x):
        outputs = self.model.apply({"params": params}, x)
        return jnp.mean(jnp.sum((outputs - 1) ** 2, axis=-1))


@functools.cache
def case() -> Case:
    return Case()


def make(name, **options):
    return FACTORIES[name](case().layers, **{**OPTIONS, **options})


class Runner:
    """A transform whose update is compiled once; counts its traces."""

    def __init__(self, tx):
        self.init, self.traces = tx.init, 0

        def update(grads, state, params, stats):
            self.traces += 1
            return tx.update(grads, state, params, stats=stats, loss=1.0, unknown=None)

        self.update = jax.jit(update)

    def run(self, batches, state=None):
        """The updates of some steps, and the last state."""
        params = case().params
        state = self.init(params) if state is None else state
        all_updates = []
        for grads, stats in batches:
            updates, state = self.update(grads, state, params, stats)
            all_updates.append(updates)
        return all_updates, state


@functools.cache
def runner(name, **options) -> Runner:
    return Runner(make(name, **options))


def first_batches(steps=STEPS):
    return case().batches[:steps]


@functools.cache
def reference(name):
    return runner(name).run(first_batches())


def assert_close(actual, expected):
    def check(a, b):
        scale = float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING * scale)

    jax.tree.map(check, actual, expected)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def our_state(opt_state) -> tekfac.ScaleByTekfacState:
    (found,) = recognise.search(opt_state, tekfac.ScaleByTekfacState)
    return found


# --- optax ---------------------------------------------------------------------------------------


@every_transform
def test_under_jit(name):
    """One trace for all steps, stable types, and unknown arguments are swallowed."""
    params = case().params
    state = runner(name).init(params)
    first_types = types(state)
    for grads, stats in first_batches():
        updates, state = runner(name).update(grads, state, params, stats)
        assert types(state) == first_types
        assert types(updates) == types(grads)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        difference = updates["last"]["kernel"] - grads["last"]["kernel"]
        assert np.abs(difference).max() > 1e-3
    assert runner(name).traces == 1


def test_eagerly():
    tx, (grads, stats) = make("tekfac"), case().batches[0]
    updates, _ = tx.update(grads, tx.init(case().params), case().params, stats=stats)
    assert_close(updates, reference("tekfac")[0][0])


# name -> wrapper that must not change anything
_WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx, optax.scale(1.0)),
    "named_chain": lambda tx: optax.named_chain(("a", tx), ("b", optax.identity())),
    "masked": lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    "partition": lambda tx: optax.partition({"a": tx}, lambda p: jax.tree.map(lambda _: "a", p)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=2),
    # Last: optax passes no further arguments to a MultiSteps inside something else.
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_wrappers_change_nothing(wrapper):
    name = "tekfac"
    updates, state = Runner(_WRAPPERS[wrapper](make(name))).run(first_batches())
    expected, expected_state = reference(name)
    assert_close(updates, expected)
    assert_close(tekfac.curvature(state), tekfac.curvature(expected_state))


@pytest.mark.sampled
@every_transform
def test_wrappers_in_one_another(name):
    tx = make(name)
    for wrap in _WRAPPERS.values():
        tx = wrap(tx)
    updates, state = Runner(tx).run(first_batches())
    expected, expected_state = reference(name)
    assert_close(updates, expected)
    assert_close(tekfac.curvature(state), tekfac.curvature(expected_state))


def _no_clip(name):
    """The clip's factor is common to all layers, and changes with the learning rate."""
    return {"kl_clip": None} if name in READY else {}


def _apart(params):
    """Labels: layer "first" to another transform, the rest to ours."""
    label = {"first": "other", "norm": "ours", "last": "ours"}
    return jax.tree_util.tree_map_with_path(lambda path, _: label[path[0].key], params)


@pytest.mark.sampled
@every_transform
def test_a_layer_that_is_masked_out(name):
    """It goes elsewhere or passes unchanged; the others are as they were."""
    tx = make(name, **_no_clip(name))
    if name in READY:
        tx, factor = optax.partition({"ours": tx, "other": optax.scale(-3.0)}, _apart), -3.0
    else:
        mask = jax.tree.map(lambda label: label == "ours", _apart(case().params))
        tx, factor = optax.masked(tx, mask), 1.0
    updates, _ = Runner(tx).run(first_batches())
    expected, _ = runner(name, **_no_clip(name)).run(first_batches())
    for actual, whole, (grads, _) in zip(updates, expected, first_batches(), strict=True):
        for key in ("norm", "last"):
            assert_close(actual[key], whole[key])
        assert_close(actual["first"], jax.tree.map(lambda g: factor * g, grads["first"]))


@every_transform
def test_inject_hyperparams(name):
    """An injected value can be changed between steps without another trace."""
    factory = SCALE_BY.get(name) or getattr(tekfac, name)
    options = {**OPTIONS, **_no_clip(name)}
    if name in READY:
        options["learning_rate"] = LEARNING_RATE
    injected = optax.inject_hyperparams(factory, static_args=INTERVALS)
    injected = Runner(injected(layers=case().layers, **options))
    (grads, stats), params = case().batches[0], case().params

    def update(grads, state, stats):
        return injected.update(grads, state, params, stats)

    state = injected.init(params)
    first_types = types(state)
    updates, state = update(grads, state, stats)
    assert types(state) == first_types
    expected, _ = runner(name, **_no_clip(name)).run(first_batches(1))
    assert_close(updates, expected[0])
    for key in {"damping", "learning_rate"} & set(state.hyperparams):
        hyperparams = {**state.hyperparams, key: 100 * state.hyperparams[key]}
        changed, _ = update(grads, state._replace(hyperparams=hyperparams), stats)
        same, _ = update(grads, state, stats)
        ratio = np.abs(changed["last"]["kernel"]).max() / np.abs(same["last"]["kernel"]).max()
        assert ratio < 0.9 if key == "damping" else ratio > 50
    assert injected.traces == 1


@pytest.mark.sampled
@every_transform
def test_multi_steps_accumulates(name):
    """Statistics of the step that updates are used; between them nothing moves."""
    tx = optax.MultiSteps(make(name), every_k_schedule=2)
    updates, state = Runner(tx).run(first_batches(4))
    assert all(not u.any() for u in jax.tree.leaves([updates[0], updates[2]]))
    (g0, _), (g1, stats) = case().batches[:2]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, g0, g1)
    expected, _ = runner(name).run([(mean, stats)])
    assert_close(updates[1], expected[0])
    assert our_state(state).count == 2


@pytest.mark.parametrize("micro_steps", [None, 3])
def test_multi_steps_decomposes_on_every_micro_step(micro_steps, monkeypatch):
    """What it costs, as the README says: the eigen work of a step on each of its micro-steps."""
    done: list[int] = []

    def counting(factor, mine):
        jax.debug.callback(lambda: done.append(1))
        return eigenvectors(factor, mine)

    monkeypatch.setattr(refresh, "eigenvectors", counting)
    tx: Any = make("scale_by_tekfac", eigenbasis_interval=3)  # due on the first step of three
    if micro_steps:
        tx = optax.MultiSteps(tx, micro_steps)
    Runner(tx).run(first_batches(3))
    jax.effects_barrier()
    factors = 2 * len(case().layers)
    assert len(done) == factors * (micro_steps or 1)


@pytest.mark.parametrize("name", ["scale_by_tekfac", "kfac"])
def test_a_state_that_a_trace_closes_over(name):
    """It has values there, and what is made of them has none: `apply_if_finite`, eager, does so."""
    tx, params, (grads, stats) = make(name), case().params, first_batches(1)[0]
    (expected,), state = runner(name).run(first_batches(1))
    start = tx.init(params)
    closed = jax.jit(lambda grads, stats: tx.update(grads, start, params, stats=stats))
    assert_close(closed(grads, stats)[0], expected)
    wrapped = optax.apply_if_finite(tx, 2)
    updates, _ = wrapped.update(grads, wrapped.init(params), params, stats=stats)
    assert_close(updates, expected)
    with_message = jax.jit(lambda x: (x, len(tekfac.check_state(state, case().layers))))
    assert with_message(1.0)[1] == 0


@pytest.mark.sampled
@every_transform
def test_apply_if_finite_rejects_a_step(name):
    tx = Runner(optax.apply_if_finite(make(name), max_consecutive_errors=2))
    grads, stats = case().batches[0]
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, state = tx.run([(grads, stats), (bad, stats), (grads, stats)])
    assert all(not u.any() for u in jax.tree.leaves(updates[1]))
    assert our_state(state).count == 2


@every_transform
def test_map_over_the_parameters_in_the_state(name):
    tx, (_, state) = make(name), reference(name)
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert_same(our_state(doubled), our_state(state))
    if name in READY:
        changed = [
            bool((a != b).any())
            for a, b in zip(jax.tree.leaves(doubled), jax.tree.leaves(state), strict=True)
        ]
        # Momentum of the two layers (three leaves), Adam's two moments of the norm's two leaves.
        assert sum(changed) == 3 + 2 * 2


@pytest.mark.sampled
@every_transform
def test_half_precision_gradients(name):
    tx = make(name)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), case().params)
    state = tx.init(params)
    first_types = types(state)
    update = jax.jit(tx.update)
    for grads, stats in case().batches[:2]:
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
        updates, state = update(grads, state, params, stats=stats)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        assert types(state) == first_types
    assert {leaf.dtype.name for leaf in jax.tree.leaves(our_state(state))} == {
        "float32", "int32", "bool",
    }  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["scale_by_tekfac", "scale_by_kfac", "clip", "running", "trace"])
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_strict_promotion(name, wide):
    """float32 parameters, also where float64 is enabled; no implicit promotion anywhere."""
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("strict"):
        options = {"running": {"rescaling": "running"}, "trace": {"damping": "trace"}}.get(name, {})
        tx = SCALE_BY.get(name, tekfac.scale_by_tekfac)(case().layers, **options)
        if name == "clip":
            tx = tekfac.clip_by_kl(tx, optax.linear_schedule(0.1, 0.0, 10))
        params = case().params
        # Statistics as they come where float64 is enabled or not.
        step = jax.jit(tekfac.value_grad_and_stats(case().loss, case().layers))
        with jax.numpy_dtype_promotion("standard"):  # LayerNorm
            _, grads, stats = step(params, jnp.ones((6, 3), jnp.float32) * 0.3)
        state = tx.init(params)
        first_types = types(state)
        updates, state = jax.jit(tx.update)(grads, state, params, stats=stats)
        assert types(state) == first_types
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


# --- without statistics --------------------------------------------------------------------------


@every_transform
def test_without_statistics(name):
    """The curvature held is used and kept, and nothing is compiled that would change it."""
    tx, params, (grads, stats) = make(name), case().params, case().batches[3]
    _, state = reference(name)
    decomposition = re.compile(r"syevd|Eigh|lapack")
    lowered = jax.jit(tx.update).lower(grads, state, params, stats=stats)
    assert decomposition.search(lowered.as_text())
    lowered = jax.jit(tx.update).lower(grads, state, params)
    assert not decomposition.search(lowered.as_text())
    updates, after = lowered.compile()(grads, state, params)
    for path, layer in our_state(state).layers.items():
        assert_same(our_state(after).layers[path]._replace(damping=layer.damping), layer)
    assert our_state(after).count == our_state(state).count + 1
    assert types(after) == types(state)
    assert np.abs(updates["last"]["kernel"] - grads["last"]["kernel"]).max() > 1e-3
    if name in SCALE_BY:  # with statistics that are not due it is the same
        with_stats, _ = runner(name, **dict.fromkeys(INTERVALS, 10)).run([(grads, stats)], state)
        assert_close(updates, with_stats[0])


@every_scale_by
def test_gradients_pass_unchanged_before_any_statistics(name):
    grads, _ = case().batches[0]
    updates, state = runner(name).run([(grads, None)] * 2)
    assert_same(updates, [grads, grads])
    assert tekfac.stats_due(state)
    assert not any(leaf.any() for leaf in our_state(state).layers["last"][:5])


@pytest.mark.parametrize("name", ["tekfac"])
def test_momentum_of_gradients_before_any_statistics(name):
    grads, _ = case().batches[0]
    updates, _ = Runner(make(name, momentum=None)).run([(grads, None)])
    assert_close(updates[0]["last"], jax.tree.map(lambda g: -LEARNING_RATE * g, grads["last"]))


# --- state ---------------------------------------------------------------------------------------


@every_transform
def test_donation(name):
    tx, (grads, stats), params = make(name), case().batches[0], case().params
    update = jax.jit(
        lambda state, g, p, stats: tx.update(g, state, p, stats=stats), donate_argnums=0
    )
    old = tx.init(params)
    memory = update.lower(old, grads, params, stats).compile().memory_analysis()
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(old))
    assert memory.alias_size_in_bytes >= kept - 64  # in place; a scalar or two may be copied
    updates, state = update(old, grads, params, stats)
    for layer in our_state(old).layers.values():
        assert all(getattr(layer, field).is_deleted() for field in (*FACTORS, "theta"))
    assert_close(updates, reference(name)[0][0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@every_transform
def test_init_needs_no_parameters(name):
    tx, params = make(name), case().params
    expected = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(expected)
    assert types(abstract) == types(expected)
    for placeholder in (None, {}, optax.MaskedNode(), jax.eval_shape(lambda: params)):
        if name in READY and isinstance(placeholder, dict) and placeholder:
            continue  # momentum wants arrays, as optax.trace does
        assert_same(our_state(tx.init(placeholder)), our_state(expected))


@every_transform
def test_flax_serialization(name):
    state = reference(name)[1]
    state_dict = jax.tree.map(np.asarray, serialization.to_state_dict(state))
    restored = serialization.from_state_dict(make(name).init(case().params), state_dict)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    as_bytes = serialization.to_bytes(state)
    assert_same(serialization.from_bytes(make(name).init(case().params), as_bytes), state)


@every_transform
@pytest.mark.filterwarnings("ignore")
def test_orbax(name, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    state = reference(name)[1]
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(make(name).init, case().params)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    assert types(restored) == types(state)
    assert tekfac.check_state(restored, case().layers) == ""


def test_shape_comments_are_true():
    """The comments in `LayerState` and `ScaleByTekfacState` against real shapes."""
    (_, state) = reference("scale_by_tekfac")
    state = our_state(state)
    for path, spec in case().layers.items():
        dims = {"i": spec.in_dim, "o": spec.out_dim}
        for node in (state.layers[path], state, state.meaning):
            comments = re.findall(
                r"^    (\w+): [^#\n]*jax\.Array[^#\n]*#.*?\(([io\d, ]*)\)",
                inspect.getsource(type(node)),
                re.M,
            )
            arrays = [
                f
                for f, t in type(node).__annotations__.items()
                if jax.Array in getattr(t, "__args__", (t,))
            ]
            assert [field for field, _ in comments] == arrays
            for field, comment in comments:
                names = [d.strip() for d in comment.split(",") if d.strip()]
                shape = tuple(int(d) if d.isdigit() else dims[d] for d in names)
                assert getattr(node, field).shape == shape, field


@pytest.mark.parametrize("name", SCALE_BY)
def test_memory_usage_is_that_of_the_arrays(name):
    state = reference(name)[1]
    usage = tekfac.memory_usage(optax.chain(make(name)).init(case().params))
    assert usage == tekfac.memory_usage(jax.eval_shape(make(name).init, case().params))
    for path, layer in state.layers.items():
        actual = {
            "factors": layer.phi.nbytes + layer.psi.nbytes,
            "eigenbasis": layer.q_phi.nbytes + layer.q_psi.nbytes,
            "rescaling": layer.theta.nbytes,
        }
        assert usage[path] == actual
        assert sum(actual.values()) == case().layers[path].state_bytes


@every_transform
def test_diagnostics(name):
    state = reference(name)[1]
    scalars = {key: np.asarray(value) for key, value in tekfac.diagnostics(state).items()}
    kinds = ("trace", "kept", "damping", "phi_spread", "psi_spread", "phi_residual",
             "psi_residual", "failures", "failed_in_a_row")  # fmt: skip
    expected = {f"{path}/{kind}" for path in case().layers for kind in kinds}
    assert set(scalars) == expected | ({"kl_clip"} if name in READY else set())
    for key, value in scalars.items():
        assert value.shape == ()
        assert np.isfinite(value), key
        assert value > 0 or key.endswith(("failures", "in_a_row", "residual"))
    fresh = tekfac.diagnostics(make(name).init(case().params))
    assert set(fresh) == set(scalars)
    assert all(np.isfinite(value) for value in fresh.values())
    curvature = tekfac.curvature(state)["first"]
    assert np.trace(curvature.phi) == pytest.approx(1, rel=1e-5)
    assert np.trace(curvature.psi) == pytest.approx(1, rel=1e-5)
    assert scalars["first/trace"] == pytest.approx(float(curvature.theta.sum()), rel=1e-5)


def test_check_state_is_a_sentence():
    layers, params = case().layers, case().params
    x = jnp.ones((6, 3), jnp.float32)
    state = optax.chain(make("scale_by_tekfac")).init(params)
    assert tekfac.check_state(state, layers) == ""
    fewer = tekfac.find_layers(case().loss, params, x, skip="first")
    assert tekfac.check_state(state, fewer) == (
        "The state lacks layers [] and has ['first'], which the network does not have."
    )
    assert "lacks layers ['first']" in tekfac.check_state(
        tekfac.scale_by_tekfac(fewer).init(params), layers
    )
    wide = jnp.ones((6, 5), jnp.float32)
    other = case().model.init(jax.random.key(0), wide)["params"]
    sentence = tekfac.check_state(state, tekfac.find_layers(case().loss, other, wide))
    assert sentence == (
        "Layer 'first' has dimensions (in, out) = (4, 4) in the state and (6, 4) in the network."
    )
    functions = (
        tekfac.curvature, tekfac.stats_due, tekfac.memory_usage, tekfac.diagnostics,
        lambda state: tekfac.check_state(state, layers),
    )  # fmt: skip
    for function in functions:
        with pytest.raises(ValueError, match=r"no state of scale_by_tekfac.*tx\.init"):
            function(optax.sgd(0.1).init(params))


# --- intervals -----------------------------------------------------------------------------------


@every_scale_by
def test_intervals(name):
    tx = runner(name, factor_interval=2, eigenbasis_interval=3, rescaling_interval=4)
    state = tx.init(case().params)
    changed = {field: [] for field in ("phi", "psi", "delta", "q_phi", "q_psi", "theta")}
    due = []
    for step, (grads, stats) in enumerate(case().batches):
        due += [step] if tekfac.stats_due(state) else []
        _, new = tx.run([(grads, stats)], state)
        for field, steps in changed.items():
            old_array, new_array = (getattr(s.layers["first"], field) for s in (state, new))
            steps += [step] if (old_array != new_array).any() else []
        state = new
    assert changed["phi"] == changed["psi"] == changed["delta"] == [0, 2, 4, 6]
    assert changed["q_phi"] == changed["q_psi"] == [0, 3, 6]
    assert changed["theta"] == [0, 3, 4, 6]
    assert due == [0, 2, 3, 4, 6]


@pytest.mark.parametrize("name", ["scale_by_tekfac", "kfac"])
def test_statistics_may_be_left_out_where_they_are_not_due(name):
    intervals = {"factor_interval": 2, "eigenbasis_interval": 2, "rescaling_interval": 4}
    expected, expected_state = runner(name, **intervals).run(first_batches(4))
    state = runner(name, **intervals).init(case().params)
    for step, (grads, stats) in enumerate(first_batches(4)):
        assert tekfac.stats_due(state) == (step in (0, 2))
        batch = (grads, stats if tekfac.stats_due(state) else None)
        (updates,), state = runner(name, **intervals).run([batch], state)
        assert_close(updates, expected[step])
    assert_close(our_state(state), our_state(expected_state))


# --- what is not finite --------------------------------------------------------------------------


def spoiled(step, part, value):
    """Statistics of that batch with one number of layer "first" that is not finite."""
    grads, stats = case().batches[step]
    (capture,) = stats.layers["first"]
    capture = capture._replace(**{part: getattr(capture, part).at[2, 0].set(value)})
    return grads, stats._replace(layers={**stats.layers, "first": (capture,)})


_EVERY_STEP = dict.fromkeys(INTERVALS, 1)


@every_scale_by
@pytest.mark.parametrize(("part", "value"), [("u", np.nan), ("a", np.inf)])
def test_bad_first_statistics(name, part, value):
    """The gradient passes, the other layers are as they were, and the next step tries again."""
    tx = runner(name, **dict.fromkeys(INTERVALS, 10))
    batches = [spoiled(0, part, value), case().batches[1], case().batches[2]]
    first, state = tx.run(batches[:1])
    assert_same(first[0]["first"], batches[0][0]["first"])
    clean, clean_state = tx.run(case().batches[:1])
    assert_same(first[0]["last"], clean[0]["last"])
    assert_same(state.layers["last"], clean_state.layers["last"])
    assert state.layers["first"].failures > 0
    assert not state.layers["first"].basis_valid
    assert tekfac.stats_due(state)
    later, state = tx.run(batches[1:2], state)
    fresh, fresh_state = tx.run(batches[1:2])
    assert_same(later[0]["first"], fresh[0]["first"])
    assert_same(
        state.layers["first"]._replace(failures=jnp.zeros((), jnp.int32)),
        fresh_state.layers["first"],
    )
    assert not tekfac.stats_due(state)


@every_scale_by
@pytest.mark.parametrize(("part", "value"), [("u", np.inf), ("a", np.nan)])
def test_bad_later_statistics(name, part, value):
    """The last good curvature stays in force."""
    tx = runner(name, **_EVERY_STEP)
    _, before = tx.run(case().batches[:2])
    (updates,), after = tx.run([spoiled(2, part, value)], before)
    (clean,), clean_after = tx.run(case().batches[2:3], before)
    for field in ("phi", "psi", "delta", "factor_weight", "theta_weight"):
        assert_same(getattr(after.layers["first"], field), getattr(before.layers["first"], field))
    assert after.layers["first"].failures > before.layers["first"].failures
    assert after.layers["last"].failures == 0
    ((held,), _) = tx.run([(case().batches[2][0], None)], before)
    assert_close(updates["first"], held["first"])
    assert_same(updates["last"], clean["last"])
    assert_same(after.layers["last"], clean_after.layers["last"])


@every_scale_by
def test_small_statistics_are_curvature_all_the_same(name):
    """Gradients of 1e-11, near convergence: their fourth powers underflow, Θ must not."""
    grads, stats = case().batches[0]
    stats = stats._replace(scale=stats.scale * 1e-11)
    curvature = tekfac.curvature(runner(name, **_EVERY_STEP).run([(grads, stats)])[1])["first"]
    assert curvature.delta > 0
    if "tk" in name or "tek" in name:  # δ is the trace of the Fisher block
        assert float(curvature.theta.sum()) == pytest.approx(float(curvature.delta), rel=1e-4)
    assert curvature.theta.sum() > 0


@every_scale_by
def test_huge_and_tiny_statistics(name):
    """Numbers whose squares leave float32's range are no reason for NaN."""
    tx = runner(name, **_EVERY_STEP)
    for factor in (1e15, 1e-25, 0.0):
        grads, stats = case().batches[0]
        stats = stats._replace(scale=stats.scale * factor)
        updates, state = tx.run([(grads, stats)] * 2)
        leaves = jax.tree.leaves((updates, tekfac.diagnostics(state), tekfac.curvature(state)))
        assert all(np.isfinite(leaf).all() for leaf in leaves), factor


# --- train state, schedules ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FACTORIES, "sgd"])
def test_train_state(name):
    params, (grads, stats) = case().params, case().batches[0]
    tx = optax.sgd(0.1) if name == "sgd" else make(name)
    state = tekfac.TrainState.create(apply_fn=case().model.apply, params=params, tx=tx)
    new = jax.jit(lambda s, g, stats: s.apply_gradients(grads=g, stats=stats))(state, grads, stats)
    if name == "sgd":
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
    else:
        updates = reference(name)[0][0]
        assert tekfac.curvature(new)["first"].theta.any()
    assert_close(new.params, optax.apply_updates(params, updates))
    assert new.step == 1
    assert new.tx is state.tx
    assert jax.tree.structure(new) == jax.tree.structure(state)
    without = jax.jit(lambda s, g: s.apply_gradients(grads=g, apply_fn=len))(new, grads)
    assert without.apply_fn is len
    assert without.step == 2


@pytest.mark.parametrize("name", ["tkfac"])
def test_schedules(name):
    factory = getattr(tekfac, name)
    constant = factory(optax.constant_schedule(LEARNING_RATE), case().layers, **OPTIONS)
    assert_close(Runner(constant).run(first_batches())[0], reference(name)[0])
    off = factory(optax.piecewise_constant_schedule(1.0, {2: 0.0}), case().layers, **OPTIONS)
    updates, _ = Runner(off).run(first_batches())
    assert all(u.any() for u in jax.tree.leaves(updates[1]))
    assert not any(u.any() for u in jax.tree.leaves(updates[2]))


def test_fallback_and_decay():
    grads, stats = case().batches[0]
    tx = Runner(make("tekfac", fallback=optax.sgd(2.0), weight_decay=0.1))
    (updates,), _ = tx.run([(grads, stats)])
    assert_close(updates["norm"], jax.tree.map(lambda g: -2 * g, grads["norm"]))
    decay = jax.tree.map(lambda p: -LEARNING_RATE * 0.1 * p, case().params)
    plain = reference("tekfac")[0][0]
    for key in ("first", "last"):
        assert_close(updates[key], jax.tree.map(jnp.add, plain[key], decay[key]))


@pytest.mark.parametrize("name", ["ekfac"])
def test_parameters_are_not_needed_without_decay(name):
    """As with optax.sgd and optax.adam."""
    tx = make(name)
    grads, stats = case().batches[0]
    updates, _ = jax.jit(tx.update)(grads, tx.init(case().params), stats=stats)
    assert_close(updates, reference(name)[0][0])


def test_traced_batch_size():
    """`batch_size` may be an array: examples that count in a padded batch, say."""
    tx = make("scale_by_tekfac", rescaling="running")
    (grads, stats), params = case().batches[0], case().params
    _, state = Runner(tx).run([(grads, stats)])
    static, _ = jax.jit(lambda g, state: tx.update(g, state, batch_size=6))(grads, state)
    traced, _ = jax.jit(lambda g, state, n: tx.update(g, state, batch_size=n))(grads, state, 6)
    assert_close(traced, static)
    with pytest.raises(ValueError, match="batch_size="):
        tx.update(grads, state, params)
