"""Normalisations with norm="unitwise": a 2×2 block for the scale and bias of each feature."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tekfac_jax as tekfac
import tekfac_jax.nnx
from tests.capturing import (
    EXACT,
    HALF,
    SINGLE,
    Net,
    losses_of,
    randn,
    random_params,
    relative_error,
    x64_standard,
)
from tests.oracles import SCALE_BY


def norm_of(make, name="norm"):
    def build(x):
        x = jnp.tanh(make(name=name)(nn.Dense(4, name="first")(x)))
        return nn.Dense(2, name="last")(x)

    return Net(build)


class Repeated(nn.Module):
    """One normalisation, called twice."""

    @nn.compact
    def __call__(self, x):
        norm = nn.LayerNorm(name="norm")
        return nn.Dense(2)(norm(jnp.tanh(norm(nn.Dense(4)(x)))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1])(nn.LayerNorm(name="norm")(x))), None


def scanned(x):
    blocks = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    return nn.Dense(2)(blocks(name="blocks")(nn.Dense(4)(x), None)[0])


def ensemble(x):
    members = nn.vmap(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(None, None),
        axis_size=3,
    )  # fmt: skip
    return members(name="blocks")(nn.Dense(4)(x), None)[0].mean(axis=0)


# name -> (model, path of the normalisation)
CASES = {
    "LayerNorm": (norm_of(nn.LayerNorm), "norm"),
    "no bias": (norm_of(lambda name: nn.LayerNorm(use_bias=False, name=name)), "norm"),
    "RMSNorm": (norm_of(nn.RMSNorm), "norm"),
    "GroupNorm": (norm_of(lambda name: nn.GroupNorm(num_groups=2, name=name)), "norm"),
    "group size": (
        norm_of(lambda name: nn.GroupNorm(num_groups=None, group_size=2, name=name)), "norm",
    ),
    "InstanceNorm": (norm_of(nn.InstanceNorm), "norm"),
    "averages": (norm_of(lambda name: nn.BatchNorm(use_running_average=True, name=name)), "norm"),
    "two feature axes": (
        norm_of(lambda name: nn.LayerNorm(1e-6, reduction_axes=(1, 2), feature_axes=(1, 2),
                                          name=name)), "norm",
    ),
    "called twice": (Repeated(), "norm"),
    "scan and remat": (Net(scanned), "blocks/norm"),
    "vmap": (Net(ensemble), "blocks/norm"),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


class Case:
    """A network, its layers with norm="unitwise", and g_n of the normalisation by brute force."""

    def __init__(self, name, zero_scale=False):
        self.model, self.path = CASES[name]
        self.x = randn(7, 3, 3)
        self.params = random_params(self.model, self.x)
        with jax.numpy_dtype_promotion("standard"):
            variables = self.model.init(jax.random.key(0), self.x)
        self.state = {k: v for k, v in variables.items() if k != "params"}
        if zero_scale:
            norm = self.params[self.path]
            self.params = {**self.params, self.path: {**norm, "scale": 0 * norm["scale"]}}
        self.layers = tekfac.find_layers(self.loss, self.params, self.x, norm="unitwise")
        self.spec = self.layers[self.path]

    def losses(self, params, x):
        return losses_of(self.model.apply({"params": params, **self.state}, x))

    def loss(self, params, x):
        return self.losses(params, x).mean()

    def of_norm(self, tree):
        for key in self.path.split("/"):
            tree = tree[key]
        return tree

    def pairs(self):
        """g_n of each feature, [N, *lead, in]: the gradient with respect to scale and bias."""

        def one(params, x):
            grads = jax.grad(lambda p: self.losses(p, x[None])[0])(params)
            norm = self.of_norm(grads)
            parts = [norm["scale"], norm["bias"]] if "bias" in norm else [norm["scale"]]
            return jnp.stack([part.reshape(self.spec.lead) for part in parts], axis=-1)

        return np.asarray(jax.jit(jax.vmap(one, (None, 0)))(self.params, self.x))

    def blocks(self):
        g = self.pairs()
        return np.einsum("n...i,n...j->...ij", g, g) / len(g)

    def step(self, sibling="tekfac", mode="raw", **options):
        tx = SCALE_BY[sibling](self.layers, **options)
        factors = "exact" if sibling in ("tekfac", "tkfac") else "plain"

        @jax.jit
        def run(params, x):
            fn = tekfac.value_grad_and_stats(self.loss, self.layers, mode=mode, factors=factors)
            state = tx.init(params)
            if mode == "reduced":  # no basis before the first step
                _, grads, stats = fn(params, x, opt_state=state)
                _, state = tx.update(grads, state, params, stats=stats)
            further = {} if mode == "raw" else {"opt_state": state}
            _, grads, stats = fn(params, x, **further)
            updates, state = tx.update(grads, state, params, stats=stats)
            return grads, updates, state

        return run(self.params, self.x)


@pytest.mark.sampled
@x64_standard
@every_case
def test_captures_are_the_pairs_of_each_example(name):
    case = Case(name)
    assert not case.layers.uncovered
    errors = tekfac.check_capture(case.loss, case.layers, case.params, case.x)
    assert max(errors.values()) <= EXACT
    g = case.pairs()
    fn = jax.jit(tekfac.value_grad_and_stats(case.loss, case.layers))
    _, grads, stats = fn(case.params, case.x)
    for n in range(len(case.x)):
        one = jax.tree.map(
            lambda v, n=n: jax.lax.slice_in_dim(v, n, n + 1, axis=len(case.spec.stack)),
            stats.layers[case.path],
        )
        total = 0
        for a, u in one:
            a, u = (v.reshape(*case.spec.stack, -1, case.spec.groups) for v in (a, u))
            parts = [(a * u).sum(-2), u.sum(-2)][: case.spec.in_dim]
            total += np.stack(parts, axis=-1) * stats.scale
        assert relative_error(total, g[n]) <= EXACT
    plain = jax.jit(jax.grad(case.loss))(case.params, case.x)
    assert max(map(relative_error, jax.tree.leaves(grads), jax.tree.leaves(plain))) <= 1e-14


@pytest.mark.sampled
@x64_standard
@pytest.mark.parametrize(
    ("name", "sibling"),
    [
        *((name, "tekfac") for name in CASES),
        *(("called twice", s) for s in ("tkfac", "ekfac", "kfac")),
    ],
)
def test_curvature_is_the_exact_block(name, sibling):
    """Every member of the family holds the exact 2×2 Fisher block of each scale-bias pair."""
    case = Case(name)
    _, _, state = case.step(sibling)
    found = tekfac.curvature(state)[case.path]
    expected = case.blocks()
    eigenvalues = found.theta[..., 0]
    operator = jnp.einsum("...ij,...j,...kj->...ik", found.q_phi, eigenvalues, found.q_phi)
    assert relative_error(operator, expected) <= EXACT
    assert relative_error(found.phi * found.delta[..., None, None], expected) <= EXACT
    assert relative_error(found.delta, np.trace(expected, axis1=-2, axis2=-1)) <= EXACT


@pytest.mark.sampled
@x64_standard
@pytest.mark.parametrize(
    ("sibling", "damping"), [("tekfac", 0.03), ("kfac", 0.03), ("tekfac", "trace")]
)
def test_update_is_the_solve_with_each_block(sibling, damping):
    case = Case("LayerNorm")
    grads, updates, _ = case.step(sibling, damping=damping, trace_floor=1e-6, damping_scale=0.5)
    blocks = case.blocks()
    if damping == "trace":  # the mean eigenvalue over all pairs, since they are one layer
        damping = np.trace(blocks, axis1=-2, axis2=-1).sum() / (2 * len(blocks))
    damped = blocks + 0.5 * damping * np.eye(2)
    g = np.stack([grads["norm"]["scale"], grads["norm"]["bias"]], axis=-1)
    expected = np.linalg.solve(damped, g[..., None])[..., 0]
    found = np.stack([updates["norm"]["scale"], updates["norm"]["bias"]], axis=-1)
    assert relative_error(found, expected) <= EXACT


@pytest.mark.sampled
@x64_standard
@pytest.mark.parametrize("name", ["LayerNorm", "called twice", "scan and remat", "vmap"])
def test_reduced_statistics_are_the_same(name):
    case = Case(name)
    _, _, state = case.step(mode="reduced", damping=0.1, factor_interval=1, rescaling_interval=1)
    found = tekfac.curvature(state)[case.path]
    operator = jnp.einsum("...ij,...j,...kj->...ik", found.q_phi, found.theta[..., 0], found.q_phi)
    assert relative_error(operator, case.blocks()) <= EXACT


@pytest.mark.slow
@x64_standard
def test_a_scale_of_zero_is_captured():
    """The normalised input is recomputed; dividing the output by the scale would fail here."""
    case = Case("LayerNorm", zero_scale=True)
    assert relative_error(tekfac.curvature(case.step()[2])["norm"].theta.sum(),
                          np.trace(case.blocks(), axis1=-2, axis2=-1).sum()) <= EXACT  # fmt: skip


@pytest.mark.slow
@x64_standard
def test_batch_norm_in_train_mode_moves_its_averages_and_sums_to_the_gradient():
    model = norm_of(lambda name: nn.BatchNorm(use_running_average=False, name=name))
    x = randn(6, 3)
    variables = model.init(jax.random.key(0), x)
    params, stats = random_params(model, x), variables["batch_stats"]

    def loss(params, x):
        y, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return losses_of(y).mean(), new

    layers = tekfac.find_layers(loss, params, x, norm="unitwise")
    assert layers["norm"].kind == "norm"
    (_, new), grads, _ = tekfac.value_grad_and_stats(loss, layers, has_aux=True)(params, x)
    (_, expected_new), expected = jax.value_and_grad(loss, has_aux=True)(params, x)
    errors = jax.tree.map(relative_error, (grads, new), (expected, expected_new))
    assert max(jax.tree.leaves(errors)) <= 1e-15
    errors = tekfac.check_capture(loss, layers, params, x, has_aux=True)
    assert max(errors.values()) <= EXACT


@pytest.mark.slow
def test_half_precision():
    """The input is bfloat16; the normalised input is captured in float32."""
    model = norm_of(lambda name: nn.LayerNorm(dtype=jnp.bfloat16, name=name))
    x = randn(6, 3).astype(jnp.bfloat16)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x).astype(jnp.float32)).mean()

    layers = tekfac.find_layers(loss, params, x, norm="unitwise")
    _, _, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    assert stats.layers["norm"][0].a.dtype == jnp.float32
    assert tekfac.check_capture(loss, layers, params, x)["norm"] <= HALF


UNCOVERED = {
    "fallback": (nn.LayerNorm, "fallback", 'LayerNorm.*norm="unitwise"'),
    "no scale": (
        lambda name: nn.LayerNorm(use_scale=False, name=name), "unitwise", "without a scale",
    ),
    "features in front": (
        lambda name: nn.LayerNorm(feature_axes=-2, reduction_axes=-1, name=name), "unitwise",
        "not the last axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_is_listed(name):
    make, norm, reason = UNCOVERED[name]
    model, x = norm_of(make), randn(5, 3, 3)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x, norm=norm)
    assert "norm" not in layers
    listed = {path: why for path, why in layers.uncovered if path.startswith("norm/")}
    assert set(listed) == {f"norm/{key}" for key in params["norm"]}
    for why in listed.values():
        assert re.search(reason, why), why


def test_unknown_option():
    model, x = norm_of(nn.LayerNorm), randn(5, 3)
    params = random_params(model, x)
    with pytest.raises(ValueError, match=r"norm must be .*'diagonal'"):
        tekfac.find_layers(
            lambda p, x: losses_of(model.apply({"params": p}, x)).mean(), params, x, norm="diagonal"
        )


@pytest.mark.slow
def test_the_ready_optimizer_clips_and_decays_it():
    """Momentum and KL clip apply to the scale, since it is captured."""
    case = Case("LayerNorm")
    tx, bare = tekfac.tekfac(0.1, case.layers), tekfac.scale_by_tekfac(case.layers)

    @jax.jit
    def run(params, x):
        _, grads, stats = tekfac.value_grad_and_stats(case.loss, case.layers)(params, x)
        updates, state = tx.update(grads, tx.init(params), params, stats=stats)
        return updates, state, bare.update(grads, bare.init(params), stats=stats)[0]

    updates, state, directions = run(case.params, case.x)
    factor = float(tekfac.diagnostics(state)["kl_clip"])
    assert factor < 1
    expected = jax.tree.map(lambda d: -0.1 * factor * d, directions)
    for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) <= SINGLE


class NnxNet(nnx.Module):
    def __init__(self, make, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = make(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


NNX = {
    "LayerNorm": (nn.LayerNorm, nnx.LayerNorm),
    "RMSNorm": (nn.RMSNorm, nnx.RMSNorm),
    "GroupNorm": (
        lambda name: nn.GroupNorm(num_groups=2, name=name),
        lambda features, rngs: nnx.GroupNorm(features, num_groups=2, rngs=rngs),
    ),
    "BatchNorm": (lambda name: nn.BatchNorm(use_running_average=False, name=name), nnx.BatchNorm),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NNX)
def test_nnx_captures_what_linen_does(name):
    linen_norm, nnx_norm = NNX[name]
    linen, x = norm_of(linen_norm), randn(6, 3)
    model = NnxNet(nnx_norm, nnx.Rngs(0))
    params = random_params(linen, x)
    nnx.update(model, jax.tree.map(lambda v: v, params))
    state = linen.init(jax.random.key(0), x)
    state = {key: value for key, value in state.items() if key != "params"}

    def linen_loss(params, x):
        y, _ = linen.apply({"params": params, **state}, x, mutable=["batch_stats"])
        return losses_of(y).mean()

    def nnx_loss(model, x):
        return losses_of(model(x)).mean()

    linen_layers = tekfac.find_layers(linen_loss, params, x, norm="unitwise")
    layers = tekfac_jax.nnx.find_layers(nnx_loss, model, x, norm="unitwise")
    assert set(layers) == set(linen_layers)
    _, _, expected = tekfac.value_grad_and_stats(linen_loss, linen_layers)(params, x)
    _, _, found = tekfac_jax.nnx.value_grad_and_stats(nnx_loss, layers)(model, x)
    for path in layers:
        for one, other in zip(found.layers[path][0], expected.layers[path][0], strict=True):
            assert relative_error(one, other) <= SINGLE


def test_one_feature_is_listed():
    def build(x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True, name="norm")(x))

    model, x = Net(build), randn(6, 4, 1)
    variables = model.init(jax.random.key(0), x)

    def loss(params, x):
        return losses_of(model.apply({**variables, "params": params}, x)).mean()

    layers = tekfac.find_layers(loss, variables["params"], x, norm="unitwise")
    assert "single feature" in dict(layers.uncovered)["norm/scale"]


def test_batch_norm_whose_averages_are_made_on_the_way():
    model, x = norm_of(lambda name: nn.BatchNorm(use_running_average=False, name=name)), randn(6, 3)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x, mutable=["batch_stats"])[0]).mean()

    layers = tekfac.find_layers(loss, params, x, norm="unitwise")
    assert tekfac.check_capture(loss, layers, params, x)["norm"] <= SINGLE


@pytest.mark.parametrize("use", [True, False])
def test_nnx_batch_norm_that_is_told_at_the_call(use):
    class Told(NnxNet):
        def __call__(self, x):
            return self.last(self.norm(self.first(x), use_running_average=use))

    model, x = Told(nnx.BatchNorm, nnx.Rngs(0)), randn(6, 3)

    def loss(model, x):
        return losses_of(model(x)).mean()

    layers = tekfac_jax.nnx.find_layers(loss, model, x, norm="unitwise")
    _, grads, stats = tekfac_jax.nnx.value_grad_and_stats(loss, layers)(model, x)
    ((a, u),) = stats.layers["norm"]
    found = jnp.sum(a * u, axis=0)
    assert relative_error(found, nnx.as_pure(grads)["norm"]["scale"]) <= SINGLE


@pytest.mark.slow
def test_a_dead_feature_leaves_the_others_in_the_kl_clip():
    case = Case("LayerNorm")
    params = {**case.params, "last": {**case.params["last"]}}
    kernel = jnp.asarray(params["last"]["kernel"])
    params["last"]["kernel"] = kernel.at[0].set(0.0)
    tx = tekfac.tekfac(1.0, case.layers, damping=1e-6, kl_clip=1e-3)

    @jax.jit
    def run(params, x):
        _, grads, stats = tekfac.value_grad_and_stats(case.loss, case.layers)(params, x)
        return grads, *tx.update(grads, tx.init(params), params, stats=stats)

    grads, updates, state = run(params, case.x)
    assert not np.any(grads["norm"]["scale"][0])
    # The clip bounds η² ⟨ΔW, G⟩ over all captured layers, the normalisation included.
    clip = float(tekfac.diagnostics(state)["kl_clip"])
    products = jax.tree.map(lambda g, u: float((g * -u).sum()), grads, updates)
    assert sum(jax.tree.leaves(products)) * clip <= 1.01e-3
