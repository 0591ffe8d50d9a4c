"""What cannot be captured is listed with a reason, or refused; it is never captured wrongly."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tekfac_jax as tekfac
from tests.capturing import (
    EXACT,
    SINGLE,
    Net,
    assert_sums_to_gradient,
    losses_of,
    mlp,
    randn,
    random_params,
    relative_error,
    x64,
    x64_standard,
)


class Case(NamedTuple):
    """A loss with one covered layer, "plain", and parameters that cannot be covered.

    Attributes:
        build: function that computes a network's outputs from its input.
        uncovered: regex on the parameter path -> regex on the reason.
        losses: (apply, params, x) -> the loss of each example.
    """

    build: Callable[[Any], Any]
    uncovered: dict[str, str]
    losses: Callable[..., Any] = lambda apply, params, x: losses_of(apply({"params": params}, x))
    shape: tuple[int, ...] = (5, 4)


def then(*layers):
    """These layers, followed by an ordinary Dense layer."""
    return lambda x: nn.Dense(2, name="plain")(
        functools.reduce(lambda x, f: jnp.tanh(f(x)), layers, x)
    )


def named(factory):
    """The layer under the name "odd"."""
    return lambda x: factory(name="odd")(x)


class Subclass(nn.Dense):
    pass


class OwnLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (4, 4), x.dtype)


def shared_vmap(x):
    heads = nn.vmap(
        nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=1,
        out_axes=1,
    )  # fmt: skip
    return heads(4, name="odd")(x[:, None] + jnp.zeros((5, 2, 1), x.dtype)).sum(axis=1)


class Conditional(nn.Module):
    @nn.compact
    def __call__(self, x):
        branch = nn.Dense(4)
        branch(x)  # creates the parameters
        return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: -m(x), branch, x)


def conditional(x):
    return Conditional(name="odd")(x)


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.Dense(4)
        body(x)
        return nn.while_loop(
            lambda m, c: c[0] < 2, lambda m, c: (c[0] + 1, jnp.tanh(m(c[1]))), body, (0, x)
        )[1]


def looped(x):
    # Only the forward pass: a while loop cannot be differentiated in reverse.
    return x + jax.lax.stop_gradient(Looped(name="odd")(jax.lax.stop_gradient(x)))


def tied_embedding(x):
    embed = nn.Embed(4, 4, name="odd")
    return (embed(jnp.asarray(x[:, 0] > 0, jnp.int32)) + x) @ embed.embedding.T


def retie(change):
    """Applies the model after changing the parameters of "odd"."""

    def losses(apply, params, x):
        return losses_of(apply({"params": {**params, "odd": change(params["odd"])}}, x))

    return losses


def tied_in_loss(apply, params, x):
    outputs = apply({"params": params}, x)
    return losses_of(outputs) + losses_of(jnp.sin(x) @ params["odd"]["kernel"].T)


def two_paths(apply, params, x):
    return losses_of(apply({"params": {**params, "other": params["odd"]}}, x))


@jax.custom_jvp
def double_gradient(x):
    """The identity with a doubled derivative, so not a copy."""
    return x


double_gradient.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


def own_custom_vjp(f):
    def forward(params, x):
        return jax.vjp(f, params, x)

    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(forward, lambda pull_back, g: pull_back(g))
    return wrapped


def dense(**options):
    return named(functools.partial(nn.Dense, 4, **options))


def convolution(**options):
    return named(functools.partial(nn.Conv, 4, (3,), **options))


def transposed(**options):
    return named(functools.partial(nn.ConvTranspose, 4, (3,), **options))


def mask_of(shape):
    return jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % 2, jnp.result_type(float))


_KERNEL, _ANY = "odd/.*kernel", "odd/"
_UNCOVERED = {
    "transposed, its kernel too": Case(
        then(transposed(transpose_kernel=True)), {_ANY: "transpose_kernel"}, shape=(5, 3, 4)
    ),
    "transposed, circular": Case(
        then(transposed(padding="CIRCULAR")), {_ANY: "circular"}, shape=(5, 3, 4)
    ),
    "transposed, masked": Case(
        then(lambda x: nn.ConvTranspose(4, (3,), mask=mask_of((3, 4, 4)), name="odd")(x)),
        {_ANY: "mask"}, shape=(5, 3, 4),
    ),
    "einsum with shared axes": Case(
        then(lambda x: nn.Einsum((3, 4, 4), "btd,tde->bte", name="odd")(x)),
        {_ANY: "einsum"}, shape=(5, 3, 4),
    ),
    "einsum with the new axis first": Case(
        then(lambda x: nn.Einsum((4, 4), "btd,ed->bte", name="odd")(x)),
        {_ANY: "einsum"}, shape=(5, 3, 4),
    ),
    "einsum given at the call": Case(
        then(lambda x: nn.Einsum((4, 4), name="odd")(x, "btd,de->bte")),
        {_ANY: "at the call"}, shape=(5, 3, 4),
    ),
    "local": Case(
        then(named(functools.partial(nn.ConvLocal, 4, (2,)))), {_ANY: "ConvLocal"}, shape=(5, 3, 4)
    ),
    "masked conv": Case(
        then(lambda x: nn.Conv(4, (3,), mask=mask_of((3, 4, 4)), name="odd")(x)),
        {_ANY: "mask"}, shape=(5, 3, 4),
    ),
    "own convolution": Case(
        then(convolution(conv_general_dilated=jax.lax.conv_general_dilated)),
        {_ANY: "conv_general_dilated"}, shape=(5, 3, 4),
    ),
    "embedding of one row": Case(
        then(lambda x: nn.Embed(1, 4, name="odd")(jnp.zeros(5, jnp.int32))), {_ANY: "single row"}
    ),
    "tied embedding": Case(then(tied_embedding), {_ANY: "tied"}),
    "optimized LSTM": Case(
        then(lambda x: nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=x.dtype), name="odd")(x)),
        {"OptimizedLSTM": "DenseParams"}, shape=(5, 3, 4),
    ),
    "layer norm": Case(then(named(nn.LayerNorm)), {_ANY: "LayerNorm"}),
    "weight norm": Case(
        then(lambda x: nn.WeightNorm(nn.Dense(4, name="odd"), name="norm")(x)),
        {"odd/kernel$": "computed|no supported", "norm/.*scale": "WeightNorm"},
    ),
    "own dot": Case(then(dense(dot_general=jax.lax.dot_general)), {_ANY: "dot_general"}),
    "own dot class": Case(
        then(dense(dot_general_cls=lambda: jax.lax.dot_general)), {_ANY: "dot_general"}
    ),
    "own promotion": Case(
        then(dense(promote_dtype=lambda *args, dtype=None, **_: list(args))),
        {_ANY: "promote_dtype"},
    ),
    "batch dims": Case(
        then(lambda x: nn.DenseGeneral(4, batch_dims=(0,), name="odd")(x)), {_ANY: "batch_dims"}
    ),
    "no batch": Case(
        then(lambda x: x + nn.Dense(4, name="odd")(x.sum(axis=0))), {_ANY: "no batch axis"}
    ),
    "contracts the batch": Case(
        then(lambda x: x + nn.DenseGeneral(4, axis=(0, 1), name="odd")(x)), {_ANY: "no batch axis"}
    ),
    "subclass": Case(then(named(functools.partial(Subclass, 4))), {_ANY: "Subclass"}),
    "own layer": Case(then(named(OwnLayer)), {_ANY: "OwnLayer"}),
    "tied in the loss": Case(then(dense()), {_ANY: "tied"}, tied_in_loss),
    "two paths": Case(
        then(dense(), lambda x: nn.Dense(4, name="other")(x)), {"other/": "no supported layer"},
        two_paths,
    ),
    "vmap with a shared kernel": Case(then(shared_vmap), {_ANY: "vmap"}),
    "nn.cond": Case(then(conditional), {_ANY: "inside cond|tied"}),
    "nn.while_loop": Case(then(looped), {_ANY: "inside while|tied"}),
    "sliced": Case(
        then(dense()), {_KERNEL: "computed|no supported"},
        retie(lambda p: {**p, "kernel": jnp.stack([p["kernel"], p["kernel"]])[1]}),
    ),
    "scaled": Case(
        then(dense()), {_KERNEL: "computed|no supported"},
        retie(lambda p: {**p, "kernel": 2 * p["kernel"]}),
    ),
    "transposed kernel": Case(
        then(dense()), {_KERNEL: "transposed"},
        retie(lambda p: {**p, "kernel": p["kernel"].T}),
    ),
    "rounded": Case(
        then(dense()), {_KERNEL: "computed|no supported"},
        retie(lambda p: {**p, "kernel": p["kernel"].astype(jnp.int32).astype(p["bias"].dtype)}),
    ),
    "frozen": Case(
        then(dense()), {_KERNEL: "computed|no supported"}, retie(jax.lax.stop_gradient)
    ),
    "its gradient doubled": Case(
        then(dense()), {_KERNEL: "computed|no supported"},
        retie(functools.partial(jax.tree.map, double_gradient)),
    ),
    "scaled bias": Case(
        then(dense()), {_KERNEL: "bias", "odd/bias": "no supported"},
        retie(lambda p: {**p, "bias": 2 * p["bias"]}),
    ),
}  # fmt: skip


@pytest.mark.sampled
@x64_standard
@pytest.mark.parametrize("name", _UNCOVERED)
def test_uncovered_layers_are_listed_with_a_reason(name):
    case = _UNCOVERED[name]
    model, x = Net(case.build), randn(*case.shape)
    params = random_params(model, x)
    if name == "two paths":
        del params["other"]

    def loss(params, x):
        return case.losses(model.apply, params, x).mean()

    layers = tekfac.find_layers(loss, params, x)
    reasons = dict(layers.uncovered)
    assert "plain" in layers
    if name == "two paths":  # further positions of one layer, captured exactly
        assert "odd" in layers
    else:
        for pattern, reason in case.uncovered.items():
            matching = {path: why for path, why in reasons.items() if re.search(pattern, path)}
            assert matching, (pattern, reasons)
            for path, why in matching.items():
                assert re.search(reason, why), (path, why)
    _, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x)
    assert_sums_to_gradient(layers, stats, grads)


def scan_over(f):
    def run(params, x):
        return jax.lax.scan(lambda c, x: (c, f(params, x[None])[0]), 0.0, x)[1]

    return run


def cond_on(f):
    return lambda params, x: jax.lax.cond(
        x.sum() > 0, f, lambda params, x: -f(params, x), params, x
    )


def map_over(f):
    return lambda params, x: jax.lax.map(lambda x: f(params, x[None])[0], x)


def loop_over(f):
    return lambda params, x: jax.lax.fori_loop(
        0, 2, lambda _, y: f(params, jnp.tile(y, (1, 2))[:, :4]), x[:, :2]
    )


# name -> (transformation of (params, x) -> outputs, the error message)
_AROUND = {
    "vmap": (lambda f: lambda p, x: jax.vmap(lambda x: f(p, x[None])[0])(x), "vmap"),
    "vmap of one example": (lambda f: jax.vmap(f, in_axes=(None, 0)), "vmap|batch axis"),
    "vmap over positions": (
        lambda f: lambda p, x: jax.vmap(f, in_axes=(None, 1), out_axes=1)(p, x[:, None]), "vmap",
    ),
    "vmap of jit": (
        lambda f: lambda p, x: jax.vmap(jax.jit(lambda x: f(p, x[None])[0]))(x), "vmap",
    ),
    "scan": (scan_over, "scan"),
    "cond": (cond_on, "cond"),
    "map": (map_over, "scan"),
    "while": (loop_over, "while|scan"),
    "custom_vjp": (own_custom_vjp, "custom_vjp"),
}  # fmt: skip


@x64
@pytest.mark.parametrize("name", _AROUND)
def test_transformations_that_hide_the_layers_are_refused(name):
    transform, reason = _AROUND[name]
    model, x = Net(then(dense())), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        return losses_of(transform(lambda p, x: model.apply({"params": p}, x))(params, x)).mean()

    with pytest.raises(ValueError, match=reason):
        tekfac.find_layers(loss, params, x)


@pytest.mark.slow
@x64
@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("vmap without batch", None),
        ("vjp", "differentiated inside the function"),
        ("vjp of jit", "differentiated inside the function"),
        ("jvp", "differentiated inside the function"),
        ("linearize", "differentiated inside the function"),
        ("gradient penalty", "differentiated inside the function"),
        ("adversarial", "differentiated inside the function"),
    ],
)
def test_derivatives_inside_the_loss_are_refused(name, refused):
    """A vmap over something other than the layers' inputs is exact."""
    model, x = Net(mlp), randn(5, 4)
    params = random_params(model, x)

    def loss(params, x):
        def outputs(x):
            return model.apply({"params": params}, x)

        if name == "vmap without batch":
            return jax.vmap(lambda w: losses_of(w * outputs(x)).mean())(x[0]).sum()
        if name == "vjp":
            return losses_of(jax.vjp(outputs, x)[0]).mean()
        if name == "vjp of jit":
            return losses_of(jax.vjp(jax.jit(outputs), x)[0]).mean()
        if name == "jvp":
            return losses_of(jax.jvp(outputs, (x,), (x,))[0]).mean()
        if name == "linearize":
            return losses_of(jax.linearize(outputs, x)[0]).mean()
        gradient = jax.grad(lambda x: losses_of(outputs(x)).sum())(x)
        if name == "adversarial":
            return losses_of(outputs(x + 0.1 * jax.lax.stop_gradient(gradient))).mean()
        return (losses_of(outputs(x)) + (gradient**2).sum(axis=1)).mean()

    if refused:
        with pytest.raises(ValueError, match=refused):
            tekfac.find_layers(loss, params, x)
        return
    layers = tekfac.find_layers(loss, params, x)
    _, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x)
    assert_sums_to_gradient(layers, stats, grads)


def test_boxed_parameters_are_captured():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model, x = Net(then(dense(kernel_init=init))), randn(5, 4)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    layers = tekfac.find_layers(loss, params, x)
    assert layers == tekfac.find_layers(loss, nn.unbox(params), x)
    assert set(layers) == {"odd", "plain"}
    assert not layers.uncovered
    _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, x)
    assert_sums_to_gradient(layers, stats, grads, SINGLE)
    tx = tekfac.tekfac(0.1, layers)
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    plain, _ = tx.update(nn.unbox(grads), tx.init(nn.unbox(params)), nn.unbox(params), stats=stats)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


# --- penalties -----------------------------------------------------------------------------------


def _squares(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


# (params, coefficient) -> penalty
_PENALTIES = {
    "L2": lambda params, c: 0.1 * _squares(params),
    "coefficient": lambda params, c: c * _squares(params),
    "divided": lambda params, c: _squares(params) / (1 + c),
    "global norm": lambda params, c: c * optax.tree.norm(params) ** 2,
    "norm": lambda params, c: optax.tree.norm(params),
    "L1": lambda params, c: sum(jnp.abs(p).sum() for p in jax.tree.leaves(params)),
    "one layer": lambda params, c: c * jnp.sum(params["Dense_0"]["kernel"] ** 2),
    "kernels": lambda params, c: sum(jnp.sum(p["kernel"] ** 2) for p in params.values()),
    "by path": lambda params, c: sum(
        c * jnp.vdot(p, p)
        for path, p in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    ),
    "gram": lambda params, c: jnp.sum(
        (params["Dense_0"]["kernel"].T @ params["Dense_0"]["kernel"] - jnp.eye(4)) ** 2
    ),
    "raveled": lambda params, c: jnp.sum(
        jnp.concatenate([p.reshape(-1) for p in jax.tree.leaves(params)]) ** 2
    ),
    "jitted": lambda params, c: c * jax.jit(_squares)(params),
    "hinge": lambda params, c: jnp.maximum(_squares(params) - 1, 0),
    "towards a prior": lambda params, c: _squares(jax.tree.map(lambda p: p - 0.5, params)),
}


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("name", _PENALTIES)
def test_penalties_do_not_uncover_a_layer(name):
    model, x = Net(mlp), randn(5, 4)
    params, coefficient = random_params(model, x), jnp.asarray(0.3)

    def data_loss(params, x):
        return losses_of(model.apply({"params": params}, x)).mean()

    def loss(params, x, coefficient):
        penalty = _PENALTIES[name]
        before = penalty(params, coefficient)
        return before + data_loss(params, x) + penalty(params, 2 * coefficient)

    layers = tekfac.find_layers(loss, params, x, coefficient)
    assert not layers.uncovered
    _, grads, stats = jax.jit(tekfac.value_grad_and_stats(loss, layers))(params, x, coefficient)
    assert_sums_to_gradient(layers, stats, jax.grad(data_loss)(params, x))
    expected = jax.grad(loss)(params, x, coefficient)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) <= EXACT


def test_spectral_normalisation_is_listed():
    """Its kernel is divided by an estimate of its largest singular value."""

    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="first")(x)
            return nn.SpectralNorm(nn.Dense(4, name="odd"), name="norm")(x, update_stats=False)

    model, x = Spectral(), randn(5, 4)
    variables = model.init(jax.random.key(0), x)

    def loss(params, x):
        outputs = model.apply({"params": params, "batch_stats": variables["batch_stats"]}, x)
        return losses_of(outputs).mean()

    layers = tekfac.find_layers(loss, variables["params"], x)
    assert set(layers) == {"first"}
    reasons = dict(layers.uncovered)
    assert re.search("computed|no supported", reasons["odd/kernel"])
    assert "odd/bias" in reasons
