"""A resumed run equals the uninterrupted one bit for bit; a state that does not fit is named."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec

import tekfac_jax as tekfac
from tests.properties import resuming
from tests.properties.resuming import STEPS, Run

of_orbax = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
VERSION_0 = Path(__file__).parent / "state_version_0.msgpack"
BEFORE_THE_FOLDERS = Path(__file__).parent / "state_version_1.pickle"  # after three steps of `Run`


def on_host(tree):
    return jax.tree.map(np.array, tree)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def by_flax(saved, fresh, folder):
    return serialization.from_bytes(fresh, serialization.to_bytes(saved))


def by_pickle(saved, fresh, folder):
    return pickle.loads(pickle.dumps(saved))


def by_orbax(saved, fresh, folder):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=ocp.args.StandardSave(saved))
        manager.wait_until_finished()
        return manager.restore(0, args=ocp.args.StandardRestore(fresh))


def by_name_from_orbax(saved, fresh, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", saved)
        checkpointer.wait_until_finished()
        raw = checkpointer.restore(folder / "state")
    return tekfac.restore_state(raw, fresh)


def by_name_from_flax(saved, fresh, folder):
    raw = serialization.msgpack_restore(serialization.to_bytes(saved))
    return tekfac.restore_state(raw, fresh)


# --- bit for bit --------------------------------------------------------------------------------


@of_orbax
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"stagger": True}],
    ids=["together", "staggered"],
)
def test_resumed_at_any_step_it_is_the_same_run(options, tmp_path):
    run = Run(**options)
    states = [on_host(state) for state in run.go_on(*run.start(), 0)]
    for k, saved in enumerate(states):
        for read in (by_flax, by_pickle, by_name_from_flax, by_orbax, by_name_from_orbax):
            folder = tmp_path / f"{k} {read.__name__}"
            folder.mkdir()
            params, opt_state = read(jax.tree.map(jnp.asarray, saved), run.start(), folder)
            assert tekfac.check_state(opt_state, run.layers, run.tx.init(params)) == ""
            assert_same_bits((params, opt_state), saved)
            *_, last = [saved, *run.go_on(params, opt_state, k + 1)]
            assert_same_bits(on_host(last), states[-1])
    assert run.traces == 1  # a restored state needs no other program


@of_orbax
def test_a_run_killed_in_the_middle_of_a_save(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.properties.resuming", str(folder), "kill"]
    killed = subprocess.run(command, cwd=Path(__file__).parent.parent.parent, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert any("tmp" in path.name for path in folder.iterdir())  # killed in the middle
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == resuming.KILLED_AFTER - 1
    resumed = resuming.train(folder, kill=False)
    run = Run(stagger=True)
    *_, whole = run.go_on(*run.start(), 0)
    assert_same_bits(on_host(resumed), on_host(whole))


def test_restored_where_the_fresh_state_lies():
    run = Run()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    fresh = jax.device_put(run.tx.init(run.params), sharding)
    restored = tekfac.restore_state(on_host(run.tx.init(run.params)), fresh)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


# --- without factors ----------------------------------------------------------------------------


@pytest.mark.slow
@of_orbax
def test_without_factors_they_are_built_anew(tmp_path):
    """The basis and Θ are kept; the next statistics give the new factors."""
    run = Run(factor_interval=5, eigenbasis_interval=5, rescaling_interval=5)
    *_, (params, opt_state) = run.go_on(*run.start(), 0, 7)
    full = sum(x.nbytes for x in jax.tree.leaves(opt_state))
    before = on_host(tekfac.curvature(opt_state))
    saved = tekfac.without_factors(opt_state)
    assert sum(x.nbytes for x in jax.tree.leaves(saved)) < 0.7 * full
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        target = tekfac.without_factors(run.tx.init(params))
        read = checkpointer.restore(tmp_path / "state", target)
    for source in (read, saved, opt_state):
        restored = tekfac.restore_state(source, run.tx.init(params), factors=False)
        sentence = tekfac.check_state(restored, run.layers)
        assert says_built_anew(sentence)
        after = tekfac.curvature(restored)
        for path in run.layers:
            assert_same_bits(
                (after[path].q_phi, after[path].theta), (before[path].q_phi, before[path].theta)
            )
    held = jax.tree.map(jnp.copy, restored)
    _, held = run.tx.update(params, held, params)  # a step without statistics
    assert bool(tekfac.stats_due(held))
    fresh = Run(factor_interval=5, eigenbasis_interval=5, rescaling_interval=5)
    *_, (_, first) = fresh.go_on(jax.tree.map(jnp.copy, params), fresh.tx.init(params), 7, 8)
    *_, (_, next_state) = run.go_on(jax.tree.map(jnp.copy, params), restored, 7, 8)
    assert tekfac.check_state(next_state, run.layers) == ""
    assert not bool(tekfac.stats_due(next_state))
    for path, new in tekfac.curvature(next_state).items():
        np.testing.assert_allclose(new.phi, tekfac.curvature(first)[path].phi, rtol=1e-6)
        np.testing.assert_array_equal(new.q_phi, before[path].q_phi)


def says_built_anew(sentence):
    return sentence.startswith("Layer 'conv' has an eigenbasis but no factors: they are rebuilt")


@pytest.mark.sampled
@pytest.mark.parametrize("optimizer", [tekfac.kfac, tekfac.tkfac])
def test_a_bad_batch_after_restoring_without_factors(optimizer):
    """Eigenvalues are not computed from factors that do not exist yet."""
    run = Run(optimizer, factor_interval=1, eigenbasis_interval=1, rescaling_interval=1)
    *_, (params, opt_state) = run.go_on(*run.start(), 0, 3)
    before = on_host(tekfac.curvature(opt_state))
    restored = tekfac.restore_state(opt_state, run.tx.init(params), factors=False)
    _, after = run.step(params, restored, run.x * jnp.nan)
    for path, layer in tekfac.curvature(after).items():
        np.testing.assert_array_equal(layer.theta, before[path].theta)


def test_a_state_without_factors_is_refused_as_it_is():
    run = Run()
    saved = tekfac.without_factors(run.tx.init(run.params))
    with pytest.raises(ValueError, match=r"no factors for layer 'conv'; with factors=False"):
        tekfac.restore_state(saved, run.tx.init(run.params))
    with pytest.raises(ValueError, match="'conv' has no factors in the state: restore_state"):
        run.tx.update(run.params, saved, run.params)
    assert tekfac.check_state(saved, run.layers).startswith("Layer 'conv' has no factors")
    for read in (tekfac.curvature, tekfac.diagnostics):
        with pytest.raises(ValueError, match="'conv' has no factors in the state: restore_state"):
            read(saved)


# --- of an earlier version ----------------------------------------------------------------------


def test_a_state_of_version_0_goes_on_as_it_would_have():
    """Written by the last version whose states had no version number."""
    record = serialization.msgpack_restore(VERSION_0.read_bytes())
    run = Run(factor_interval=2, eigenbasis_interval=3, rescaling_interval=2, damping_scale=1.0)
    params = jax.tree.map(jnp.asarray, record["params"])
    opt_state = tekfac.restore_state(record["opt_state"], run.tx.init(params))
    assert tekfac.check_state(opt_state, run.layers, run.tx.init(params)) == ""
    for _ in range(4):
        params, opt_state = run.step(params, opt_state, run.x)
    for one, other in zip(*map(jax.tree.leaves, (params, record["later"])), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


def older(opt_state):
    """The same state in the format of version 0."""

    def strip(node):
        if not isinstance(node, tekfac.ScaleByTekfacState):
            return node
        layers = {
            path: layer._replace(failed_in_a_row=None, fallen_back=None)
            for path, layer in node.layers.items()
        }
        return node._replace(layers=layers, meaning=None)

    return jax.tree.map(
        strip, opt_state, is_leaf=lambda node: isinstance(node, tekfac.ScaleByTekfacState)
    )


def test_a_state_of_version_0_is_recognised():
    run = Run()
    *_, (params, opt_state) = run.go_on(*run.start(), 0, 3)
    old = older(opt_state)
    assert tekfac.check_state(old, run.layers).startswith("The state has layout version 0")
    with pytest.raises(ValueError, match="restore_state converts it"):
        run.tx.update(params, old, params)
    assert_same_bits(tekfac.restore_state(old, run.tx.init(params)), opt_state)


def test_a_state_of_a_later_version_is_refused():
    run = Run()
    opt_state = run.tx.init(run.params)
    later = jax.tree.map(
        lambda node: (
            node._replace(version=node.version + 7) if isinstance(node, tekfac.StateKind) else node
        ),
        opt_state,
        is_leaf=lambda node: isinstance(node, tekfac.StateKind),
    )
    expected = r"layout version 8, but this tekfac_jax reads versions up to 1: update"
    with pytest.raises(ValueError, match=expected):
        tekfac.restore_state(later, opt_state)
    with pytest.raises(ValueError, match=expected):
        run.tx.update(run.params, later, run.params)


# --- what does not fit --------------------------------------------------------------------------

OTHERS = {
    "kfac": (
        lambda layers: tekfac.kfac(0.05, layers),
        "belongs to KFAC, but the optimizer is TEKFAC",
    ),
    "ekfac": (lambda layers: tekfac.ekfac(0.05, layers), "belongs to EKFAC"),
    "tkfac": (lambda layers: tekfac.tkfac(0.05, layers), "belongs to TKFAC"),
    "factors": (
        lambda layers: tekfac.tekfac(0.05, layers, factors="location"),
        'TEKFAC with factors="location"',
    ),
    "rescaling": (
        lambda layers: tekfac.tekfac(0.05, layers, rescaling="running"),
        'TEKFAC with rescaling="running"',
    ),
    "basis_rank": (
        lambda layers: tekfac.tekfac(0.05, layers, basis_rank=2),
        r"'\w+' keeps \(\d+, 2\) eigenvectors .* basis_rank and max_dim as before",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_options_are_said(other):
    make, expected = OTHERS[other]
    run = Run()
    saved, fresh = make(run.layers).init(run.params), run.tx.init(run.params)
    with pytest.raises(ValueError, match=expected):
        tekfac.restore_state(saved, fresh)
    sentence = tekfac.check_state(saved, run.layers, fresh)
    with pytest.raises(ValueError, match=expected):
        raise ValueError(sentence)
    with pytest.raises(ValueError, match=expected):
        run.tx.update(run.params, saved, run.params)


def test_another_dtype_is_said(x64):
    run = Run()
    fresh = run.tx.init(run.params)
    saved = tekfac.tekfac(0.05, run.layers, factor_dtype=jnp.float64).init(run.params)
    expected = "'phi' of layer 'conv' is float64 in the state and float32 .* factor_dtype as before"
    with pytest.raises(ValueError, match=expected):
        tekfac.restore_state(saved, fresh)


def test_a_divided_state_is_said():
    run = Run()
    mesh = jax.make_mesh((1,), ("data",))
    saved = tekfac.tekfac(0.05, run.layers, mesh=mesh, shard_state=True).init(run.params)
    with pytest.raises(ValueError, match="'conv' has shard_state=True in the state and False"):
        tekfac.restore_state(saved, run.tx.init(run.params))


class Wider(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (2, 2), name="conv")(x))
        return nn.Dense(2, name="head")(x.reshape(len(x), -1))


class Longer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(resuming.Net()(x))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Wider(), r"'conv' has dimensions \(in, out\) = \(9, 4\) in the state and \(9, 3\)"),
        (
            Longer(),
            r"lacks layers \['conv', 'head'\] and has \['Net_0/conv', 'Net_0/head', 'last'\]",
        ),
    ],
    ids=["wider", "longer"],
)
def test_other_layers_are_said(model, expected):
    run = Run()
    params = model.init(jax.random.key(0), run.x)["params"]
    layers = tekfac.find_layers(lambda p, x: model.apply({"params": p}, x).sum(), params, run.x)
    saved = tekfac.tekfac(0.05, layers).init(params)
    with pytest.raises(ValueError, match=expected):
        tekfac.restore_state(saved, run.tx.init(run.params))
    with pytest.raises(ValueError, match=expected):
        raise ValueError(tekfac.check_state(saved, run.layers))
    with pytest.raises(ValueError, match=expected):
        run.tx.update(run.params, saved, run.params)


def test_what_is_missing_and_what_is_too_much_is_named():
    run = Run()
    fresh = run.tx.init(run.params)
    raw = serialization.to_state_dict(fresh)
    with pytest.raises(ValueError, match=r"lacks \[\] and has \['more'\]"):
        tekfac.restore_state({**raw, "more": np.zeros(2)}, fresh)
    bare = tekfac.scale_by_tekfac(run.layers)
    raw = serialization.to_state_dict(bare.init(run.params))
    del raw["layers"]["head"]["theta"]
    with pytest.raises(ValueError, match=r"lacks \['layers/head/theta'\]"):
        tekfac.restore_state(raw, bare.init(run.params))


def test_targets_that_are_none():
    run = Run()
    fresh = run.tx.init(run.params)
    with pytest.raises(ValueError, match="has no state of scale_by_tekfac"):
        tekfac.restore_state(fresh, optax.adam(0.1).init(run.params))
    with pytest.raises(ValueError, match="must hold arrays, not shapes"):
        tekfac.restore_state(fresh, jax.eval_shape(run.tx.init, run.params))


def test_leaves_that_no_state_has_are_named():
    run = Run()
    tx = tekfac.scale_by_tekfac(run.layers)
    fresh = tx.init(run.params)

    def replaced(**fields):
        return fresh._replace(
            layers={**fresh.layers, "head": fresh.layers["head"]._replace(**fields)}
        )

    flat = replaced(theta=fresh.layers["head"].theta[0])
    for refuse in (
        lambda: tekfac.restore_state(flat, fresh),
        lambda: tx.update(run.params, flat, run.params),
    ):
        with pytest.raises(ValueError, match=r"'theta' of layer 'head' has shape \(\d+,\) instead"):
            refuse()
    shapes = replaced(psi=jax.eval_shape(jnp.asarray, fresh.layers["head"].psi))
    with pytest.raises(
        ValueError, match=r"must hold arrays; a jax\.ShapeDtypeStruct has no values"
    ):
        tx.update(run.params, shapes, run.params)
    for junk in (np.zeros(0, bool), np.array("a"), jax.random.key(0)):
        saved = fresh._replace(meaning=fresh.meaning._replace(plain=junk))
        with pytest.raises(ValueError, match=r"saved= cannot be read: 'plain' of its meaning is"):
            tekfac.restore_state(saved, fresh)


def test_other_states_are_checked_as_well():
    run = Run()
    fresh = run.tx.init(run.params)
    saved = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float16) if leaf.shape == (2,) else leaf, fresh
    )
    with pytest.raises(
        ValueError, match=r"is float16\(2,\) in saved= and float32\(2,\) in opt_state="
    ):
        tekfac.restore_state(saved, fresh)


def test_a_train_state_is_restored_as_a_whole():
    run = Run()
    state = tekfac.TrainState.create(apply_fn=None, params=run.params, tx=run.tx)
    raw = serialization.msgpack_restore(serialization.to_bytes(state))
    assert_same_bits(tekfac.restore_state(raw, state), state)


def test_steps_of_an_interval():
    """The steps resumed from cover a whole interval between two full refreshes."""
    assert int(np.lcm.reduce(list(resuming.INTERVALS.values()))) == STEPS


def bare(rate, layers, **options):
    return optax.chain(tekfac.scale_by_tekfac(layers, **options), optax.scale(-rate))


@pytest.mark.parametrize("how", ["as it is", "restore_state"])
def test_a_pickle_made_before_the_folders_goes_on(how):
    """It names our types by modules that are folders today."""
    saved = pickle.loads(BEFORE_THE_FOLDERS.read_bytes())
    run = Run(bare)
    assert saved["layers"] == run.layers
    saved_params, state = jax.tree.map(jnp.asarray, (saved["params"], saved["state"]))
    fresh = run.tx.init(run.params)
    if how == "restore_state":
        state = tekfac.restore_state(state, fresh[0])
    opt_state = (state, *fresh[1:])
    assert tekfac.check_state(opt_state, run.layers, fresh) == ""

    *_, (_, expected) = run.go_on(*run.start(), 0, 3)  # what it was saved after
    found, expected = map(tekfac.diagnostics, (opt_state, expected))
    for name, value in expected.items():
        if name.endswith(("/trace", "/damping")):  # the same in any basis that `eigh` may find
            np.testing.assert_allclose(found[name], value, rtol=1e-3)
    *_, (params, _) = run.go_on(saved_params, opt_state, 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_type_that_never_was_says_so():
    with pytest.raises(AttributeError, match="attribute 'Share'"):
        pickle.loads(b"ctekfac_jax._state\nShare\n.")
