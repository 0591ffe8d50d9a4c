"""Random small networks and random options, and what must hold for every step with them.

A network is drawn as plain data, so that a failing example is readable. One step is one compiled
program: gradient, statistics, update, and what our readers say about the state after it.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import tekfac_jax as tekfac
from tekfac_jax._layers.matrices import to_matrices
from tekfac_jax._state.layout import LayerState
from tests.capturing import losses_of
from tests.oracles import SCALE_BY

READY = {"tekfac": tekfac.tekfac, "tkfac": tekfac.tkfac, "ekfac": tekfac.ekfac, "kfac": tekfac.kfac}
MEASURED = ("tekfac", "ekfac")
PLAIN = ("ekfac", "kfac")
PRODUCTS = ("tkfac", "kfac")
STEPS = 3

# --- networks --------------------------------------------------------------------------------


class Block(NamedTuple):
    """A layer and what follows it."""

    kind: str  # dense, general, conv, transpose, embed, flatten
    features: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    param_dtype: str
    dtype: str | None  # of the arithmetic
    norm: str | None
    activation: str
    lift: str | None = None  # how Flax repeats or wraps it: remat, vmap, scan, twice


class Network(NamedTuple):
    """A stack of blocks, and the batches that it is given."""

    blocks: tuple[Block, ...]
    shape: tuple[int, ...]  # of a batch
    rows: int | None  # of the embedding that reads the batch, which then holds integers
    norm: str  # of `find_layers`
    scale: float  # of the loss
    seed: int


class Stack(nn.Module):
    """The module of a `Network`."""

    blocks: tuple[Block, ...]

    @nn.compact
    def __call__(self, x):
        for number, block in enumerate(self.blocks):
            x = _lifted(block, f"layer_{number}")(x)
            x = _normalised(block, f"norm_{number}", x)
            x = {"tanh": jnp.tanh, "relu": nn.relu, "none": lambda x: x}[block.activation](x)
        return x


class Cell(nn.Module):
    """One iteration of a scan: a layer whose output has the shape of its input."""

    block: Block

    @nn.compact
    def __call__(self, carry, _):
        return jnp.tanh(_layer(self.block, "layer")(carry)).astype(carry.dtype), None


COPIES = 2  # of a layer that is repeated
_OWN_PARAMETERS: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def _lifted(block: Block, name: str) -> Any:
    if block.lift == "scan":
        scanned = nn.scan(Cell, length=COPIES, **_OWN_PARAMETERS)(block, name=name)
        return lambda x: scanned(x, None)[0]
    if block.lift == "vmap":
        side_by_side = functools.partial(nn.vmap, in_axes=None, axis_size=COPIES, **_OWN_PARAMETERS)
        layer = _layer(block, name, side_by_side)
        return lambda x: layer(x).sum(axis=0)
    layer = _layer(block, name, nn.remat if block.lift == "remat" else lambda kind: kind)
    return (lambda x: layer(layer(x))) if block.lift == "twice" else layer


def _layer(block: Block, name: str, lift: Any = lambda kind: kind) -> Any:
    if block.kind == "flatten":
        return lambda x: x.reshape(x.shape[0], -1)
    options: dict[str, Any] = dict(block.options, name=name, dtype=block.dtype)
    options["param_dtype"] = jnp.dtype(block.param_dtype)
    if block.kind == "embed":
        return lift(nn.Embed)(options.pop("rows"), *block.features, **options)
    if block.kind == "general":
        return lift(nn.DenseGeneral)(block.features, **options)
    kind = {"dense": nn.Dense, "conv": nn.Conv, "transpose": nn.ConvTranspose}[block.kind]
    return lift(kind)(*block.features, **options)


def _normalised(block: Block, name: str, x: Any) -> Any:
    options: dict[str, Any] = {"param_dtype": jnp.dtype(block.param_dtype), "name": name}
    if block.norm == "batch":
        return nn.BatchNorm(use_running_average=False, **options)(x)
    return nn.LayerNorm(**options)(x) if block.norm == "layer" else x


_sizes = st.integers(1, 6)
_dtypes = st.sampled_from(["float64", "float64", "float32"])


@st.composite
def networks(draw) -> Network:
    """Draws one to four layers whose shapes fit."""
    rank = draw(st.integers(0, 3))
    batch = draw(st.integers(1, 7))
    rows = draw(st.integers(1, 6)) if rank == 0 else None
    shape = (batch, *(draw(_sizes) for _ in range(max(rank, draw(st.integers(0, 1))))))
    blocks, now = [], shape
    if rows is not None:
        blocks.append(draw(_blocks("embed", now, rows)))
        now = (*now, *blocks[0].features)
    while len(blocks) < 4:
        kind = draw(st.sampled_from(_kinds(now)))
        blocks.append(draw(_blocks(kind, now)))
        now = _output_shape(blocks[-1], now)
        if draw(st.booleans()):
            break
    norm = draw(st.sampled_from(["fallback", "unitwise"]))
    scale = draw(st.sampled_from([1.0, 1.0, 1e-4, 1e3]))
    return Network(tuple(blocks), shape, rows, norm, scale, draw(st.integers(0, 10**6)))


def _kinds(shape: tuple[int, ...]) -> list[str]:
    kinds = ["dense", "general"]
    if len(shape) in (3, 4):
        kinds += ["conv", "conv", "transpose"]
    return [*kinds, "flatten"] if len(shape) > 2 else kinds


@st.composite
def _blocks(draw, kind: str, shape: tuple[int, ...], rows: int = 0) -> Block:
    features, options = (draw(st.one_of(_sizes, st.just(shape[-1]))),), {}
    if kind in ("dense", "general", "conv", "transpose"):
        options["use_bias"] = draw(st.booleans())
    if kind == "embed":
        options["rows"] = rows
    if kind == "conv":
        features, more = draw(_convolutions(shape))
        options |= more
    if kind == "transpose":
        options |= draw(_windows(shape))
    if kind == "general":
        last = draw(st.integers(1, len(shape) - 1))
        axes = draw(st.permutations(range(-last, 0)))[: draw(st.integers(1, last))]
        options["axis"] = axes[0] if len(axes) == 1 and draw(st.booleans()) else tuple(axes)
        if len(shape) - len(axes) <= 2:
            features = tuple(draw(st.lists(_sizes, min_size=1, max_size=2)))
    block = Block(
        kind,
        features,
        tuple(sorted(options.items())),
        draw(_dtypes),
        draw(st.sampled_from([None, None, None, "bfloat16"])),
        draw(st.sampled_from([None, None, "batch", "layer"])),
        draw(st.sampled_from(["tanh", "tanh", "relu", "none"])),
    )
    return block if kind == "flatten" else block._replace(lift=draw(_lifts(block, shape)))


def _lifts(block: Block, shape: tuple[int, ...]) -> st.SearchStrategy[str | None]:
    repeated = block.kind != "embed" and _output_shape(block, shape) == shape
    return st.sampled_from([None, *["scan", "twice"] * repeated, "remat", "vmap", None])


@st.composite
def _convolutions(draw, shape: tuple[int, ...]) -> tuple[tuple[int, ...], dict[str, Any]]:
    channels = shape[-1]
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3) if channels % g == 0]))
    features = draw(st.one_of(st.integers(1, 3).map(lambda n: n * groups), st.just(channels)))
    return (features,), draw(_windows(shape)) | {"feature_group_count": groups}


@st.composite
def _windows(draw, shape: tuple[int, ...]) -> dict[str, Any]:
    space = shape[1:-1]
    padding = draw(st.sampled_from(["SAME", "VALID"]))
    window = tuple(draw(st.integers(1, 3)) for _ in space)
    dilation = tuple(draw(st.integers(1, 2)) for _ in space)
    if padding == "VALID":  # at least one position must come out
        window = tuple(min(k, n) for k, n in zip(window, space, strict=True))
        dilation = tuple(
            d if (k - 1) * d < n else 1 for k, d, n in zip(window, dilation, space, strict=True)
        )
    return {
        "kernel_size": window,
        "strides": tuple(draw(st.integers(1, 2)) for _ in space),
        "kernel_dilation": dilation,
        "padding": padding,
    }


def _output_shape(block: Block, shape: tuple[int, ...]) -> tuple[int, ...]:
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(Stack((block._replace(norm=None),)).init_with_output,
                          jax.random.key(0), x)[0].shape  # fmt: skip


# --- options ---------------------------------------------------------------------------------

_VALID: dict[str, Any] = {
    "factor_interval": st.integers(1, 3),
    "eigenbasis_interval": st.integers(1, 3),
    "rescaling_interval": st.integers(1, 3),
    "factor_decay": st.sampled_from([0, 0.5, 0.95]),
    "rescaling_decay": st.sampled_from([0, 0.5, 0.95]),
    "damping": st.sampled_from(["auto", "trace", 1e-6, 1e-3, 0.1, 100, np.float32(0.01)]),
    "trace_floor": st.sampled_from([0, 1e-6, 0.01, 10.0]),
    "damping_scale": st.sampled_from([1e-3, 0.3, 1, 30.0]),
    "fc_damping": st.sampled_from(["beta", "own"]),
    "damping_form": st.sampled_from(["exact", "factored"]),
    "factors": st.sampled_from(["exact", "location"]),
    "rescaling": st.sampled_from(["exact", "running"]),
    "statistics_examples": st.sampled_from([None, 1, 2, 100]),
    "basis_rank": st.sampled_from([None, None, "auto", 1, 2, 3, 10**30, 0.3, 1.0]),
    "max_dim": st.sampled_from([None, 1, 3, 40]),
    "eigenbasis": st.sampled_from(["auto", "eigh", "subspace"]),
    "stagger": st.booleans(),
    "early_refreshes": st.booleans(),
    "max_failures": st.sampled_from([None, 1, 5, np.int64(2)]),
    "factor_dtype": st.sampled_from([None, "float64", "float64", "float32"]),
}
_VALID_READY: dict[str, Any] = {
    "learning_rate": st.sampled_from([0.1, 1e-3, 5.0, optax.linear_schedule(0.1, 0.01, 3)]),
    "momentum": st.sampled_from([None, 0, 0.9]),
    "weight_decay": st.sampled_from([0.0, 1e-2]),
    "kl_clip": st.sampled_from([None, 1e-3, 1e-9, 100.0]),
}


class Setting(NamedTuple):
    """An optimizer, where its statistics come from, and how the batch is split."""

    member: str
    ready: dict[str, Any] | None  # arguments of the ready optimizer; None: `scale_by_<member>`
    options: dict[str, Any]
    source: str  # raw, reduced, sampled or exact (Fisher)
    split: str | None = None  # over as many devices as divide the batch, by a mesh or by shard_map


@st.composite
def settings_of(draw) -> Setting:
    """Draws a member of the family with valid options, most of them at their defaults."""
    member = draw(st.sampled_from(sorted(SCALE_BY)))
    names = draw(st.sets(st.sampled_from(sorted(_VALID)), max_size=9))
    options = {name: draw(_VALID[name]) for name in sorted(names)}
    ready = None
    if draw(st.booleans()):
        ready = {name: draw(values) for name, values in _VALID_READY.items()}
    sources = ["raw", "raw", "reduced", "sampled"] + ["exact"] * (member not in PLAIN)
    source = draw(st.sampled_from(sources))
    if source == "reduced":
        options.pop("statistics_examples", None)
    truncated = any(options.get(name) is not None for name in ("basis_rank", "max_dim"))
    if member not in PRODUCTS or truncated:
        options.pop("damping_form", None)
    split = draw(st.sampled_from([None, None, None, None, "mesh", "shard_map"]))
    return Setting(member, ready, options, source, split)


def transformation(setting: Setting, layers: tekfac.Layers, mesh: Mesh) -> Any:
    """The transformation of a setting; `mesh` has one axis."""
    split: dict[str, dict[str, Any]] = {
        "mesh": {"mesh": mesh}, "shard_map": {"axis_name": mesh.axis_names[0]}
    }  # fmt: skip
    options = setting.options | split.get(setting.split or "", {})
    if setting.ready is None:
        return SCALE_BY[setting.member](layers, **options)
    ready = dict(setting.ready, fallback=optax.sgd(FALLBACK_RATE))
    rate = ready.pop("learning_rate")
    return READY[setting.member](rate, layers, **ready, **options)


def mesh_for(batch_size: int) -> Mesh:
    """The largest mesh that divides a batch."""
    sizes = [n for n in range(1, jax.device_count() + 1) if batch_size % n == 0]
    return jax.make_mesh((max(sizes),), ("data",), axis_types=(AxisType.Auto,))


FALLBACK_RATE = 0.01

# --- steps -----------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A `Network` as functions of its parameters, and its layers."""

    predict: Any
    loss: Any
    params: Any
    batches: list[Any]
    layers: tekfac.Layers


def make_problem(network: Network) -> Problem:
    """Makes parameters, batches and layers; raises what `find_layers` raises."""
    model, rng = Stack(network.blocks), np.random.default_rng(network.seed)

    def batch() -> Any:
        if network.rows is not None:
            return jnp.asarray(rng.integers(0, network.rows, network.shape), jnp.int32)
        return jnp.asarray(rng.normal(size=network.shape), jnp.float64)

    batches = [batch() for _ in range(STEPS)]
    shapes = jax.eval_shape(model.init, jax.random.key(0), batches[0])
    params = jax.tree.map(
        lambda s: jnp.asarray(0.6 * rng.normal(size=s.shape), s.dtype), shapes.get("params", {})
    )

    def predict(params, x):
        return model.apply({"params": params}, x, mutable=["batch_stats"])[0]

    def loss(params, x):
        return network.scale * losses_of(predict(params, x).astype(jnp.float64)).mean()

    layers = tekfac.find_layers(loss, params, batches[0], norm=network.norm)
    return Problem(predict, loss, params, batches, layers)


class Step(NamedTuple):
    """Everything that can be read after one step, as numpy arrays."""

    params: Any
    grads: Any
    updates: Any
    curvature: dict[str, tekfac.Curvature]
    factors: list[Any]  # Φ and Ψ of each layer
    diagnostics: dict[str, Any]
    finite: Any


def run_steps(problem: Problem, setting: Setting) -> list[Step]:
    """A few steps of one compiled program, each on its own batch."""
    mesh = mesh_for(problem.batches[0].shape[0])
    tx = transformation(setting, problem.layers, mesh)
    statistics = _statistics_function(problem, setting)
    axis = mesh.axis_names[0] if setting.split == "shard_map" else None

    def step(params, opt_state, x, key):
        grads, stats = statistics(params, opt_state, x, key)
        if axis is not None:
            grads = lax.pmean(grads, axis)
        more = {"batch_size": len(problem.batches[0])} if setting.source != "raw" else {}
        updates, opt_state = tx.update(grads, opt_state, params, stats=stats, **more)
        # Small steps, so that gradients stay moderate with any setting.
        moved = jax.tree.map(lambda p, u: p + (0.01 * jnp.tanh(u)).astype(p.dtype), params, updates)
        found = tekfac.curvature(opt_state), _factors_in(opt_state), tekfac.diagnostics(opt_state)
        finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), (updates, opt_state))
        return moved, opt_state, Step(params, grads, updates, *found, finite)

    batched = NamedSharding(mesh, P("data"))
    if axis is not None:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(), P("data"), P()), out_specs=P(), check_vma=False
        )
    step = jax.jit(step)
    params, opt_state, steps = problem.params, tx.init(problem.params), []
    if setting.split is not None:
        params, opt_state = jax.device_put((params, opt_state), NamedSharding(mesh, P()))
    for number, x in enumerate(problem.batches):
        if setting.split is not None:
            x = jax.device_put(x, batched)
        params, opt_state, shown = step(params, opt_state, x, jax.random.key(number))
        steps.append(jax.tree.map(np.asarray, shown))
    assert tekfac.check_state(opt_state, problem.layers) == ""
    return steps


def _factors_in(opt_state: Any) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LayerState))
    return [(node.phi, node.psi) for node in nodes if isinstance(node, LayerState)]


def _statistics_function(problem: Problem, setting: Setting) -> Any:
    """(params, opt_state, x, key) -> gradient and statistics."""
    loss, layers = problem.loss, problem.layers
    if setting.source == "raw":
        fn = tekfac.value_grad_and_stats(loss, layers)
        return lambda params, opt_state, x, key: fn(params, x)[1:]
    if setting.source == "reduced":
        kind = setting.options.get("factors", "exact")
        kind = "plain" if setting.member in PLAIN else kind
        fn = tekfac.value_grad_and_stats(loss, layers, mode="reduced", factors=kind)
        return lambda params, opt_state, x, key: fn(
            params, x, opt_state=opt_state, when=tekfac.stats_due(opt_state)
        )[1:]
    fn = tekfac.fisher_stats(
        problem.predict, layers, likelihood=tekfac.Gaussian(), estimator=setting.source
    )
    key_of = (lambda key: {"key": key}) if setting.source == "sampled" else lambda key: {}
    return lambda params, opt_state, x, key: (
        jax.grad(loss)(params, x),
        fn(params, x, **key_of(key)),
    )


# --- what must hold --------------------------------------------------------------------------


def assert_covered_or_listed(problem: Problem) -> None:
    """Each parameter belongs to a captured layer, or is listed with a reason."""
    listed = dict(problem.layers.uncovered)
    captured = {
        f"{path}/{name}"
        for path, spec in problem.layers.items()
        for name in spec.parameter_shapes()
    }
    leaves = jax.tree_util.tree_flatten_with_path(problem.params)[0]
    every = {"/".join(key.key for key in path) for path, _ in leaves}
    assert captured | set(listed) == every
    assert not captured & set(listed)
    assert all(len(reason) > 10 for reason in listed.values())


def assert_captured_exactly(network: Network, problem: Problem) -> None:
    """`check_capture` finds no error, except where the gradient is zero up to rounding."""
    x = problem.batches[0]
    errors = tekfac.check_capture(problem.loss, problem.layers, problem.params, x)
    bound = tolerance_of_capture(network)
    suspects = [path for path, error in errors.items() if not error <= bound]
    if not suspects:
        return
    _, grads, stats = tekfac.value_grad_and_stats(problem.loss, problem.layers)(problem.params, x)
    gradients = to_matrices(grads, problem.layers)
    for path in suspects:
        parts = sum(
            float(jnp.linalg.norm(c.u.ravel()) * (1 + jnp.linalg.norm(c.a.astype(float).ravel())))
            for c in stats.layers[path]
        )
        size = float(jnp.linalg.norm(gradients[path].ravel()))
        assert errors[path] * size <= bound * parts, (path, errors[path], size, parts)


def tolerance_of_capture(network: Network) -> float:
    """The tolerance of the least precise arithmetic in the network."""
    if any(block.dtype == "bfloat16" for block in network.blocks):
        return 5e-2
    return 1e-10 if all(b.param_dtype == "float64" for b in network.blocks) else 1e-4


def assert_split_is_whole(network: Network, problem: Problem, setting: Setting, step: Step) -> None:
    """The first factors of a split batch are those of the whole batch on one device."""
    by_device = setting.split == "shard_map" and (
        setting.source == "sampled" or any(block.norm == "batch" for block in network.blocks)
    )
    # Taken from each device's own examples.
    chosen = setting.options.get("statistics_examples") is not None
    if setting.split is None or by_device or chosen:
        return
    (whole, *_) = run_steps(problem, setting._replace(split=None))
    single = setting.options.get("factor_dtype") == "float32"
    bound = 10 * max(tolerance_of_capture(network), 1e-5 if single else 0)
    for x, y in zip(*map(jax.tree.leaves, (step.factors, whole.factors)), strict=True):
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y)


def assert_dense_solves(problem: Problem, setting: Setting, steps: list[Step]) -> None:
    """Each update is the dense solve with the gradient, followed by the rest of the chain."""
    momentum = None
    for number, step in enumerate(steps):
        assert all(jax.tree.leaves(step.finite)), "an update or a state is not finite"
        gradients = to_matrices(step.grads, problem.layers)
        expected, errors, counted = {}, {}, 0.0
        dampings = expected_dampings(problem.layers, setting, step.curvature)
        for path, spec in problem.layers.items():
            shown = step.diagnostics[f"{path}/damping"]
            np.testing.assert_allclose(np.max(dampings[path]), shown, rtol=1e-5)
            if not spec.lead:  # the exact λ, which may be rounded to float32
                dampings[path] = np.asarray(shown)
            assert step.diagnostics[f"{path}/failures"] == 0
            g = np.asarray(gradients[path], np.float64)
            expected[path], errors[path], valid = solved(
                spec, step.curvature[path], dampings[path], g, _shape_of_pi(setting, spec)
            )
            counted += float(np.sum(expected[path] * g)) if valid else 0.0
        if setting.ready is not None:
            expected, errors, momentum = _chained(
                problem, setting, step, number, expected, errors, counted, momentum
            )
            _assert_fallback(problem, step)
        actual = to_matrices(step.updates, problem.layers)
        for path, update in expected.items():
            error = np.linalg.norm(np.asarray(actual[path], np.float64) - update)
            assert error <= errors[path], (path, number, error, errors[path])


def _shape_of_pi(setting: Setting, spec: tekfac.LayerSpec) -> float | None:
    """√(dim A / dim U), by which π differs from the root of tr A / tr U; None: exact damping."""
    if setting.options.get("damping_form") != "factored":
        return None
    return math.sqrt(spec.in_dim / spec.out_dim) if setting.member == "kfac" else 1.0


def solved(
    spec: tekfac.LayerSpec,
    found: tekfac.Curvature,
    damping: Any,
    g: np.ndarray,
    factored: float | None = None,
) -> tuple[np.ndarray, float, bool]:
    """(Q_Φ⊗Q_Ψ) (Θ + λ)⁻¹ (Q_Φ⊗Q_Ψ)ᵀ g, layer by layer of those that are stacked.

    Returns:
        The solution, a bound on its rounding error, and whether there is any curvature.
    """
    out, bound, any_valid = np.array(g), 0.0, False
    epsilon = max(np.finfo(found.theta.dtype).eps, np.finfo(jnp.dtype(spec.dtype)).eps)
    for index in np.ndindex(*spec.lead):
        theta, rest = found.theta[index], float(found.theta_rest[index])
        q_phi = np.eye(spec.in_dim) if found.q_phi is None else found.q_phi[index]
        q_psi, matrix, lam = found.q_psi[index], g[index], float(damping[index])
        if not theta.sum() > 0:  # no curvature: the gradient is unchanged
            bound += 4 * epsilon * np.linalg.norm(matrix)
            continue
        any_valid = True
        q = np.kron(q_phi.astype(float), q_psi.astype(float))
        np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=1e3 * epsilon)
        damped = theta.astype(float) + lam
        if factored is not None:
            rows, columns = theta.astype(float).sum(1), theta.astype(float).sum(0)
            cross = np.add.outer(factored * rows, columns / factored)
            damped += np.sqrt(lam / theta.sum()) * cross
        inverse = 1 / damped.ravel()
        solve, least = (q * inverse) @ q.T, 1 / inverse.max()
        if q.shape[0] > q.shape[1]:
            solve += (np.eye(len(q)) - q @ q.T) / (rest + lam)
            least = min(least, rest + lam)
        out[index] = (solve @ matrix.ravel()).reshape(matrix.shape)
        bound += ROUNDING * epsilon * np.linalg.norm(matrix) / least
    return out, bound, any_valid


ROUNDING = 2e3  # units in the last place of ‖G‖ / (least eigenvalue + λ): 4e-13 in float64


def expected_dampings(
    layers: tekfac.Layers, setting: Setting, found: dict[str, tekfac.Curvature]
) -> dict[str, np.ndarray]:
    """λ of each layer by Eq. 3.4 and 3.5, from the curvature in the state."""
    options, convs = setting.options, [p for p, s in layers.items() if s.kind == "conv"]
    rule = options.get("damping", "auto")
    if rule == "auto":
        rule = "trace" if convs else 1e-3
    scale = options.get("damping_scale")
    if scale is None:
        scale = 0.3 if rule == "trace" and setting.ready is not None else 1.0
    dampings, valid = {}, {}
    for path, spec in layers.items():
        theta, n = np.asarray(found[path].theta, float), spec.in_dim * spec.out_dim
        outside = n - theta.shape[-2] * theta.shape[-1]
        traces = theta.sum((-2, -1)) + np.asarray(found[path].theta_rest, float) * outside
        valid[path] = theta.sum((-2, -1)) > 0
        if spec.kind == "norm" and spec.groups > 1:
            traces, n = traces.sum(-1, keepdims=True), n * spec.groups
        floor = options.get("trace_floor", 0.01)
        one = np.maximum(traces, floor) / n if rule == "trace" else np.float64(rule)
        dampings[path] = np.broadcast_to(one * scale, spec.lead)
    if rule == "trace" and convs and options.get("fc_damping", "beta") == "beta":
        beta = max(np.max(np.where(valid[p], dampings[p], 0)) for p in convs)
        for path, spec in layers.items():
            if beta > 0 and spec.kind == "dense" and spec.positions == 1:
                dampings[path] = np.asarray(beta)
    return dampings


def _chained(
    problem: Problem, setting: Setting, step: Step, number: int, expected: Any, errors: Any,
    counted: float, before: Any,
) -> Any:  # fmt: skip
    """KL clip, momentum, decoupled decay and −η, applied to the expected direction."""
    ready: Any = setting.ready
    eta = ready["learning_rate"]
    eta = float(eta(jnp.int32(number)) if callable(eta) else eta)
    factor = 1.0
    if ready["kl_clip"] is not None:
        divergence = eta**2 * counted
        factor = min(1.0, math.sqrt(ready["kl_clip"] / divergence)) if divergence > 0 else 1.0
        np.testing.assert_allclose(step.diagnostics["kl_clip"], factor, rtol=1e-4)
        factor = float(step.diagnostics["kl_clip"])
    else:
        assert "kl_clip" not in step.diagnostics
    weights = to_matrices(step.params, problem.layers)
    clipped, updates, bounds, velocity = {}, {}, {}, {}
    for path, spec in problem.layers.items():
        leads = np.sum(np.asarray(step.curvature[path].theta), (-2, -1)) > 0
        clipped[path] = expected[path] * (factor if np.any(leads) else 1.0)
        error = errors[path] * (factor if np.any(leads) else 1.0)
        old = before[path] if before else (0.0, 0.0)
        mu = ready["momentum"] or 0.0
        velocity[path] = clipped[path] + mu * old[0], error + mu * old[1]
        decayed = velocity[path][0] + ready["weight_decay"] * np.asarray(weights[path], float)
        updates[path] = -eta * decayed
        rounding = 16 * np.finfo(jnp.dtype(spec.dtype)).eps * np.linalg.norm(updates[path])
        bounds[path] = eta * velocity[path][1] + rounding
    return updates, bounds, velocity


def _assert_fallback(problem: Problem, step: Step) -> None:
    """Parameters that are not captured take a step of the fallback."""
    flat = functools.partial(jax.tree_util.tree_flatten_with_path)
    updates, grads = (dict(flat(tree)[0]) for tree in (step.updates, step.grads))
    for path, update in updates.items():
        if "/".join(key.key for key in path) in dict(problem.layers.uncovered):
            np.testing.assert_allclose(update, -FALLBACK_RATE * grads[path], rtol=1e-6)
