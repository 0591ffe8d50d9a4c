"""G_n is formed once for factors and Θ if both are due and memory allows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tekfac_jax._curvature import by_kind, dense
from tekfac_jax._optimizer import algorithm, refresh, sums
from tests.capturing import Net, losses_of, random_params, relative_error, x64
from tests.oracles import make_case
from tests.sharing import needs_devices


def grouped(x):
    """A convolution, a grouped one, and dense layers with several positions and with one."""
    x = jnp.tanh(nn.Conv(4, (3, 3), name="first")(x))
    x = jnp.tanh(nn.Conv(4, (3, 3), strides=2, feature_group_count=2, name="groups")(x))
    x = jnp.tanh(nn.Dense(5, name="positions")(x)).mean(axis=(1, 2))
    return nn.Dense(3, name="head")(x)


class Formed:
    """Steps of a network that count how often G_n is formed."""

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
    """Counts the examples that pass through `gradients` in a step."""
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
    """The layers whose gradients are formed once in two steps on four devices, and the updates."""
    formed, real = set(), algorithm.form_gradients_once

    def spy(*arguments):
        sources = real(*arguments)
        formed.update(path for path, s in sources.items() if isinstance(s, sums.FromGradients))
        return sources

    patch.setattr(refresh, "FORMED_IN_ALL", budget)
    patch.setattr(algorithm, "form_gradients_once", spy)
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
    # In numbers: no layer fits, then some, then all three that have positions.
    for budget in (0, 1000, 2**27):
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
