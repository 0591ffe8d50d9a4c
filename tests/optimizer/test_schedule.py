"""Staggered refreshes, each layer at its own steps, and early refreshes."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tekfac_jax as tekfac
from tekfac_jax._optimizer.schedule import _costs, offsets
from tests.capturing import EXACT, Net, losses_of, randn, random_params, relative_error, x64
from tests.oracles import SCALE_BY
from tests.sharing import Network, layers_of, mesh_of, needs_devices

INTERVALS = {"factor_interval": 3, "eigenbasis_interval": 6, "rescaling_interval": 3}


def build(x):
    for width in (5, 4, 4, 3):
        x = jnp.tanh(nn.Dense(width)(x))
    return x


class Case:
    def __init__(self, **options):
        model, self.x = Net(build), randn(7, 9, 4)
        self.params = random_params(model, self.x[0])

        def loss(params, x):
            return losses_of(model.apply({"params": params}, x)).mean()

        self.layers = tekfac.find_layers(loss, self.params, self.x[0])
        options = {"stagger": True, "damping": 0.1, **INTERVALS, **options}
        self.tx = tekfac.scale_by_tekfac(self.layers, **options)
        self.traces = 0

        @jax.jit
        def step(params, state, x):
            self.traces += 1
            _, grads, stats = tekfac.value_grad_and_stats(loss, self.layers)(params, x)
            updates, state = self.tx.update(grads, state, params, stats=stats)
            return optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates)), state

        self.step = step

    def run(self, steps, start=0, state=None, params=None):
        """The states before and after each step, and the last parameters."""
        state = self.tx.init(self.params) if state is None else state
        params = self.params if params is None else params
        states = [state]
        for step in range(start, start + steps):
            params, state = self.step(params, state, self.x[step % 7])
            states.append(state)
        return states, params


def changed(before, after, field):
    return {
        path
        for path in after.layers
        if (getattr(before.layers[path], field) != getattr(after.layers[path], field)).any()
    }


@x64
def test_each_layer_is_refreshed_at_its_own_steps():
    case = Case()
    offset = offsets(case.layers, *INTERVALS.values())
    assert len(set(offset.values())) > 1
    states, _ = case.run(20)
    fields = {"psi": "factor_interval", "q_psi": "eigenbasis_interval",
              "theta_weight": "rescaling_interval"}  # fmt: skip
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        anything = False
        for field, interval in fields.items():
            expected = {path for path in case.layers if step == 0
                        or (step - offset[path]) % INTERVALS[interval] == 0}  # fmt: skip
            assert changed(before, after, field) == expected, (step, field)
            anything |= bool(expected)
        assert bool(tekfac.stats_due(before)) == anything, step
    assert case.traces == 1


@x64
def test_it_continues_where_it_was():
    """The schedule depends only on the step count in the state."""
    case = Case()
    _, expected = case.run(15)
    states, params = case.run(8)
    _, actual = case.run(7, 8, states[-1], params)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@needs_devices
@x64
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "options",
    [
        {"stagger": True, "factor_interval": 2, "rescaling_interval": 2, "eigenbasis_interval": 4},
        {"early_refreshes": True, **dict.fromkeys(INTERVALS, 6)},
    ],
    ids=["staggered", "early"],
)
def test_on_a_mesh_it_is_one_device(options):
    network = Network(**options)
    errors = jax.tree.map(
        relative_error, network.on_mesh(mesh_of(4), steps=6), network.on_one_device(6)
    )
    assert max(jax.tree.leaves(errors)) <= EXACT


@settings(deadline=None, max_examples=40)
@given(
    dims=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=12),
    intervals=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
)
def test_the_busiest_step_is_never_busier_than_all_at_once(dims, intervals):
    layers = layers_of(*dims)
    found = offsets(layers, *intervals)
    assert set(found) == set(layers)
    assert all(0 <= offset < max(intervals) for offset in found.values())
    cycle = int(np.lcm.reduce(intervals))
    load, together = np.zeros(cycle), np.zeros(cycle)
    for path, spec in layers.items():
        for cost, interval in zip(_costs(spec), intervals, strict=True):
            load[found[path] % interval :: interval] += cost
            together[::interval] += cost
    assert load.sum() == pytest.approx(together.sum())
    assert load.max() <= together.max() * (1 + 1e-12)


def test_equal_layers_have_steps_of_their_own():
    found = offsets(layers_of(*[(20, 20)] * 10), 50, 50, 50)
    assert len(set(found.values())) == 10


def test_intervals_must_be_known():
    layers = layers_of((3, 3))
    with pytest.raises(ValueError, match=r"stagger=True.*Python integers"):
        tekfac.scale_by_tekfac(layers, stagger=True, factor_interval=jnp.int32(3))


# --- early refreshes ----------------------------------------------------------------------------


def refreshed(steps, **options):
    """The steps at which statistics were due, and those at which each field changed."""
    case = Case(**options)
    states, _ = case.run(steps)
    called = [step for step, state in enumerate(states[:-1]) if tekfac.stats_due(state)]
    changes = {
        field: [
            step for step, pair in enumerate(itertools.pairwise(states)) if changed(*pair, field)
        ]
        for field in ("psi", "q_psi", "theta_weight")
    }
    assert case.traces == 1
    return called, changes


@x64
def test_early_refreshes_are_at_powers_of_two():
    intervals = {"factor_interval": 6, "eigenbasis_interval": 12, "rescaling_interval": 3}
    called, changes = refreshed(26, stagger=False, early_refreshes=True, **intervals)
    every = {
        "psi": [0, 1, 2, 4, 6, 12, 18, 24],
        "q_psi": [0, 1, 2, 4, 8, 12, 24],
        "theta_weight": [0, 1, 2, *range(3, 26, 3)],
    }
    assert changes == every
    assert called == sorted(set().union(*every.values()))
    called, changes = refreshed(26, stagger=False, **intervals)
    assert called == sorted({*range(0, 26, 3)})
    assert changes["q_psi"] == [0, 12, 24]


@x64
def test_early_refreshes_of_staggered_layers_are_at_the_same_steps():
    """Early refreshes are the same for all layers; later ones follow each layer's offset."""
    case = Case(early_refreshes=True, **dict.fromkeys(INTERVALS, 6))
    offset = offsets(case.layers, 6, 6, 6)
    assert len(set(offset.values())) > 1
    states, _ = case.run(16)
    for path, own in offset.items():
        expected = {0, 1, 2, 4, *range(own, 16, 6)}
        found = [
            step
            for step, pair in enumerate(itertools.pairwise(states))
            if path in changed(*pair, "q_psi")
        ]
        assert found == sorted(expected), path


class Cell(nn.Module):
    """A layer that a scan stacks."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4)(x)), None


@x64
@pytest.mark.parametrize("member", SCALE_BY)
def test_early_refreshes_of_stacked_layers_and_reduced_statistics(member):
    """Statistics are contracted only when they are due, for every member of the family."""
    scanned = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    model, x = Net(lambda x: nn.Dense(3)(scanned(name="stack")(x, None)[0])), randn(7, 5, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    assert {spec.lead for spec in layers.values()} == {(2,), ()}
    tx = SCALE_BY[member](layers, damping=0.1, early_refreshes=True, **dict.fromkeys(INTERVALS, 6))
    factors = "plain" if member in ("ekfac", "kfac") else "exact"
    grad_fn = tekfac.value_grad_and_stats(loss, layers, mode="reduced", factors=factors)

    @jax.jit
    def step(state, x):
        due = tekfac.stats_due(state)
        _, grads, stats = grad_fn(params, x, opt_state=state, when=due)
        return tx.update(grads, state, params, stats=stats)[1], due

    state, found, called = tx.init(params), {path: [] for path in layers}, []
    for number in range(9):
        before = state
        state, due = step(state, x * (1 + number))
        called += [number] if due else []
        for path in changed(before, state, "psi"):
            found[path].append(number)
    assert called == [0, 1, 2, 4, 6]
    assert found == {path: called for path in layers}
