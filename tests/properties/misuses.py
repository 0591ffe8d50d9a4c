"""Random mistakes: arguments and pytrees of the wrong kind, and who raises the error.

An error is ours if the innermost frame of its traceback is in the package. An error of the user's
own function passes through; then the user's frame is inside ours.
"""

import dataclasses
import functools
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tekfac_jax as tekfac
from tests.capturing import simple_case

PACKAGE = pathlib.Path(tekfac.__file__).parent
USERS = (pathlib.Path(__file__).parent.parent, pathlib.Path(nn.__file__).parent)

JUNK: tuple[Any, ...] = (
    None, "x", "", b"x", -1, 0, True, 1.5, float("nan"), float("inf"), 1e308, 1e-300, 2**40, 2**70,
    1j, [1], (1,), {}, {1}, object(), int, np.ones(2), jnp.ones(2), np.array("a"), np.zeros(0),
    np.array([1, "a"], object), np.float32("nan"), jnp.dtype("int8"), jax.random.key(0),
    jax.ShapeDtypeStruct((), jnp.float32), jnp.ones((2, 3, 4)),
)  # fmt: skip
NO_FUNCTIONS = tuple(x for x in JUNK if not callable(x))


def assert_ours(call: Callable[[], Any], name: str = "") -> bool:
    """Whether the call succeeds; if it fails, the error must be ours (and contain the name)."""
    filtering = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # otherwise JAX hides its own frames
    raised = None
    try:
        call()
    except Exception as error:
        raised = error
    finally:
        jax.config.update("jax_traceback_filtering", filtering)
    if raised is None:
        return True
    frames = [pathlib.Path(f.filename) for f in traceback.extract_tb(raised.__traceback__)]
    ours = [i for i, frame in enumerate(frames) if PACKAGE in frame.parents]
    deeper = frames[ours[-1] + 1 :] if ours else frames
    if not (ours and any(user in frame.parents for frame in deeper for user in USERS)):
        where = "".join(traceback.format_tb(raised.__traceback__)[-2:])
        assert not deeper, f"{raised!r}\n{where}"
        assert isinstance(raised, ValueError | TypeError), raised
        assert len(str(raised).split()) >= 6, raised
        assert name in str(raised), raised
    return False


def mutated(tree: Any, rng: Any) -> Any:
    """The tree with one mistake in it."""
    inner = isinstance(tree, dict | tuple) and len(tree) > 0
    if not inner or rng.random() < 0.1:
        if hasattr(tree, "shape") and rng.random() < 0.6:
            return rng.choice(_OTHER_ARRAYS)(tree)
        return rng.choice(JUNK)
    if isinstance(tree, dict):
        new, key, kind = dict(tree), rng.choice(list(tree)), rng.random()
        value = new.pop(key)
        if kind < 0.1:
            return new
        new[rng.choice(["other", 3]) if kind < 0.2 else key] = value
        return new if kind < 0.2 else {**new, key: mutated(value, rng)}
    items = list(tree)
    if not hasattr(tree, "_fields") and rng.random() < 0.2:
        return tree[:-1]
    position = rng.randrange(len(items))
    items[position] = mutated(items[position], rng)
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


_OTHER_ARRAYS: tuple[Callable[[Any], Any], ...] = (
    lambda x: x[None],
    lambda x: x.reshape(-1),
    lambda x: jnp.zeros((*x.shape, 2)),
    lambda x: x.T if x.ndim > 1 else jnp.zeros((0, *x.shape)),
    lambda x: x.astype(jnp.int32),
    lambda x: x.astype(jnp.complex64),
    lambda x: x.astype(bool),
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
)


def traced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Traces a call, which costs no arithmetic; arguments that are no arrays stay static."""

    def is_odd(node: Any) -> bool:
        return node is None or (isinstance(node, dict) and len({type(k) for k in node}) > 1)

    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_odd)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def run(arrays: list[jax.Array]) -> list[jax.Array]:
        given = iter(arrays)
        merged = [next(given) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, merged)
        return [x for x in jax.tree.leaves(function(*args, **kwargs)) if isinstance(x, jax.Array)]

    jax.eval_shape(run, arrays)


@functools.cache
def mistakes() -> dict[str, Callable[[Any], Any]]:
    """Description of a mistake -> function of a random generator that makes it."""
    loss, params, x, layers = simple_case()
    gather = tekfac.value_grad_and_stats(loss, layers)
    reduce = tekfac.value_grad_and_stats(loss, layers, mode="reduced")
    tx, ready = tekfac.scale_by_tekfac(layers), tekfac.tekfac(0.1, layers)
    running = tekfac.scale_by_tekfac(layers, rescaling="running")
    state, first, second = tx.init(params), running.init(params), ready.init(params)
    _, grads, stats = gather(params, x)
    _, _, reduced = reduce(params, x, opt_state=state)
    mesh, number = jax.make_mesh((1,), ("data",)), jnp.float32(3)
    likelihood = tekfac.Categorical()

    def logits(params: Any, x: Any) -> Any:
        return jnp.ones((6, 3)) * loss(params, x)

    def other_reduced(r: Any) -> Any:
        field = r.choice(["layers", "examples", "factors"])
        return dataclasses.replace(reduced, **{field: mutated(getattr(reduced, field), r)})

    def returning(r: Any, value: Any) -> Any:
        value = mutated(value, r)
        return lambda params, x: (loss(params, x), value)[1]

    def sample(predict: Any = logits, key: Any = None) -> Any:
        fn = tekfac.fisher_stats(predict, layers, likelihood=likelihood)
        return traced(fn, params, x, key=jax.random.key(0) if key is None else key)

    def value_and_grad(r: Any, name: str) -> Any:
        options = {name: mutated(number, r)}
        return traced(tekfac.value_grad_and_stats(loss, layers, **options), params, x)

    return {
        "parameters to look at": lambda r: tekfac.find_layers(loss, mutated(params, r), x),
        "batch to look at": lambda r: tekfac.find_layers(loss, params, mutated(x, r)),
        "skip": lambda r: tekfac.find_layers(loss, params, x, skip=mutated(number, r)),
        "pattern to skip": lambda r: tekfac.find_layers(
            loss, params, x, skip=r.choice(["(", "*a", "[", "nothing like that", "\\"])
        ),
        "norm": lambda r: tekfac.find_layers(loss, params, x, norm=mutated(number, r)),
        "function to look at": lambda r: tekfac.find_layers(r.choice(NO_FUNCTIONS), params, x),
        "parameters": lambda r: traced(gather, mutated(params, r), x),
        "batch": lambda r: traced(gather, params, mutated(x, r)),
        "function": lambda r: tekfac.value_grad_and_stats(r.choice(NO_FUNCTIONS), layers),
        "loss": lambda r: traced(
            tekfac.value_grad_and_stats(returning(r, number), layers), params, x
        ),
        "loss and aux": lambda r: traced(
            tekfac.value_grad_and_stats(returning(r, (number, x)), layers, has_aux=True), params, x
        ),
        **{
            name: functools.partial(value_and_grad, name=name)
            for name in ("reduction", "loss_scale", "examples", "mode", "has_aux")
        },
        "when": lambda r: traced(
            reduce, params, x, opt_state=state, when=mutated(jnp.array(True), r)
        ),
        "slots": lambda r: traced(
            tekfac.tap(loss, layers), params, mutated(dict(stats.layers), r), x
        ),
        "gradient": lambda r: traced(tx.update, mutated(grads, r), state, params, stats=stats),
        "gradient of a ready optimizer": lambda r: traced(
            ready.update, mutated(grads, r), second, params, stats=stats
        ),
        "statistics": lambda r: traced(tx.update, grads, state, params, stats=mutated(stats, r)),
        "reduced statistics": lambda r: traced(
            tx.update, grads, state, params, stats=other_reduced(r)
        ),
        "batch_size": lambda r: traced(
            running.update, grads, first, params, batch_size=mutated(number, r)
        ),
        "state": lambda r: traced(tx.update, grads, r.choice(JUNK), params, stats=stats),
        "part of a state": lambda r: traced(
            tx.update, grads, mutated(state, r), params, stats=stats
        ),
        "saved state": lambda r: tekfac.restore_state(mutated(state, r), state),
        "place of a saved state": lambda r: tekfac.restore_state(state, mutated(state, r)),
        "layers of a state": lambda r: tekfac.check_state(state, mutated(number, r)),
        "state of a ready optimizer": lambda r: traced(
            ready.update, grads, r.choice([*JUNK, state]), params, stats=stats
        ),
        "state to read": lambda r: tekfac.curvature(r.choice(JUNK)),
        "key": lambda r: sample(key=mutated(number, r)),
        "outputs": lambda r: sample(returning(r, jnp.ones((6, 3)))),
        "likelihood": lambda r: tekfac.fisher_stats(
            logits, layers, likelihood=mutated(number, r)
        ),
        "variance": lambda r: tekfac.Gaussian(mutated(number, r)),
        "devices": lambda r: tekfac.device_plan(layers, mutated(number, r)),
        "layers to plan": lambda r: tekfac.device_plan(mutated(number, r), 2),
        "layers to shard": lambda r: tekfac.opt_state_sharding(mutated(number, r), mesh),
        "layers to check": lambda r: tekfac.check_capture(loss, mutated(number, r), params, x),
        "mesh": lambda r: tekfac.opt_state_sharding(layers, mutated(number, r)),
        "axis": lambda r: tekfac.opt_state_sharding(layers, mesh, mesh_axis=mutated(number, r)),
        "inner": lambda r: tekfac.clip_by_kl(mutated(number, r), 0.1),
        "max_kl": lambda r: tekfac.clip_by_kl(optax.identity(), 0.1, mutated(number, r)),
        "updates": lambda r: tekfac.step_diagnostics(layers, params, grads, mutated(grads, r)),
    }  # fmt: skip
