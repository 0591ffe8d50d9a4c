"""Every public transform behaves as optax and Flax expect, and fails gracefully."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature.decomposition import eigenvectors
from tekfac_jax._optimizer import refresh
from tests.conforming import (
    FACTORIES,
    FACTORS,
    INTERVALS,
    LEARNING_RATE,
    OPTIONS,
    READY,
    SCALE_BY,
    Runner,
    assert_close,
    assert_same,
    case,
    every_scale_by,
    every_transform,
    first_batches,
    make,
    our_state,
    reference,
    runner,
    standard_promotion,
    types,
)

pytestmark = standard_promotion


# --- optax ---------------------------------------------------------------------------------------


@every_transform
def test_under_jit(name):
    """One trace for all steps, stable types, and unknown arguments are ignored."""
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
    # The outermost: inside another wrapper MultiSteps gets no extra arguments from optax.
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
    """Options without the KL clip, which couples the layers and depends on the learning rate."""
    return {"kl_clip": None} if name in READY else {}


def _apart(params):
    """Labels: layer "first" to another transform, the rest to ours."""
    label = {"first": "other", "norm": "ours", "last": "ours"}
    return jax.tree_util.tree_map_with_path(lambda path, _: label[path[0].key], params)


@pytest.mark.sampled
@every_transform
def test_a_layer_that_is_masked_out(name):
    """Its gradient goes to another transform, or passes unchanged; other layers do not change."""
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
    """The statistics of the updating step are used; the other steps change nothing."""
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
    """Its cost, as the docs state: every micro-step does the eigendecompositions of a step."""
    done: list[int] = []

    def counting(factor, mine):
        jax.debug.callback(lambda: done.append(1))
        return eigenvectors(factor, mine)

    monkeypatch.setattr(refresh, "eigenvectors", counting)
    tx: Any = make("scale_by_tekfac", eigenbasis_interval=3)  # due in the first of three steps
    if micro_steps:
        tx = optax.MultiSteps(tx, micro_steps)
    Runner(tx).run(first_batches(3))
    jax.effects_barrier()
    factors = 2 * len(case().layers)
    assert len(done) == factors * (micro_steps or 1)


@pytest.mark.parametrize("name", ["scale_by_tekfac", "kfac"])
def test_a_state_that_a_trace_closes_over(name):
    """The state is concrete there but derived values are traced, as in `apply_if_finite`."""
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
    """No implicit promotion with float32 parameters, whether or not float64 is enabled."""
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("strict"):
        options = {"running": {"rescaling": "running"}, "trace": {"damping": "trace"}}.get(name, {})
        tx = SCALE_BY.get(name, tekfac.scale_by_tekfac)(case().layers, **options)
        if name == "clip":
            tx = tekfac.clip_by_kl(tx, optax.linear_schedule(0.1, 0.0, 10))
        params = case().params
        # Statistics computed with float64 enabled or not.
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
    """The curvature is used and kept, and no code that would change it is compiled."""
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
    if name in SCALE_BY:  # statistics that are not due make no difference
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
            continue  # momentum needs arrays, as in optax.trace
        assert_same(our_state(tx.init(placeholder)), our_state(expected))


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
    """Statistics of that batch with one value of layer "first" replaced."""
    grads, stats = case().batches[step]
    (capture,) = stats.layers["first"]
    capture = capture._replace(**{part: getattr(capture, part).at[2, 0].set(value)})
    return grads, stats._replace(layers={**stats.layers, "first": (capture,)})


_EVERY_STEP = dict.fromkeys(INTERVALS, 1)


@every_scale_by
@pytest.mark.parametrize(("part", "value"), [("u", np.nan), ("a", np.inf)])
def test_bad_first_statistics(name, part, value):
    """The gradient passes unchanged, other layers are unaffected, and the next step retries."""
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
    """The last good curvature stays in use."""
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
    """Gradients of 1e-11, as near convergence: their fourth powers underflow, but Θ must not."""
    grads, stats = case().batches[0]
    stats = stats._replace(scale=stats.scale * 1e-11)
    curvature = tekfac.curvature(runner(name, **_EVERY_STEP).run([(grads, stats)])[1])["first"]
    assert curvature.delta > 0
    if "tk" in name or "tek" in name:  # δ is the trace of the Fisher block
        assert float(curvature.theta.sum()) == pytest.approx(float(curvature.delta), rel=1e-4)
    assert curvature.theta.sum() > 0


@every_scale_by
def test_huge_and_tiny_statistics(name):
    """Values whose squares overflow or underflow float32 cause no NaN."""
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
    """Like optax.sgd and optax.adam."""
    tx = make(name)
    grads, stats = case().batches[0]
    updates, _ = jax.jit(tx.update)(grads, tx.init(case().params), stats=stats)
    assert_close(updates, reference(name)[0][0])


def test_traced_batch_size():
    """`batch_size` may be an array, such as the number of real examples in a padded batch."""
    tx = make("scale_by_tekfac", rescaling="running")
    (grads, stats), params = case().batches[0], case().params
    _, state = Runner(tx).run([(grads, stats)])
    static, _ = jax.jit(lambda g, state: tx.update(g, state, batch_size=6))(grads, state)
    traced, _ = jax.jit(lambda g, state, n: tx.update(g, state, batch_size=n))(grads, state, 6)
    assert_close(traced, static)
    with pytest.raises(ValueError, match="batch_size="):
        tx.update(grads, state, params)
