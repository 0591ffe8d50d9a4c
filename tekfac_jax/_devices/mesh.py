"""Where the optimizer's state is placed on a mesh, and how a refresh runs there."""

# pyright: reportUnknownMemberType=false
# JAX leaves `lax.psum`, `lax.all_gather` and parameters of `lax.cond` untyped.

import math
from collections.abc import Callable
from typing import TypeGuard, cast

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tekfac_jax._layers.spec import Layers, check_layers, unchanged
from tekfac_jax._layers.statistics import Statistics, StatisticsOfBatch
from tekfac_jax._layers.types import AxisName, OptState, PyTree
from tekfac_jax._state.folding import FOLD, SQUARES, folded, is_folded, unfolded
from tekfac_jax._state.initial import initial_state
from tekfac_jax._state.layout import LayerState, is_layer_state

States = dict[str, LayerState]
Refresh = Callable[[jax.Array, States, StatisticsOfBatch | None, jax.Array], States]


def opt_state_sharding(
    layers: Layers, mesh: Mesh, opt_state: OptState = None, *, mesh_axis: AxisName | None = None
) -> PyTree:
    """Shardings of an optimizer's state, for `jit`, `jax.device_put` and checkpoints.

    Folded factors and eigenvectors (``shard_state=True``) are divided over the mesh axis;
    everything else is replicated.

    Args:
        layers: from `find_layers`.
        mesh: the mesh.
        opt_state: an optax state that contains ours, or its shapes (``jax.eval_shape(tx.init,
            params)``). Other transformations' state is replicated. None: the state of
            ``scale_by_tekfac(layers, mesh=mesh, shard_state=True)`` by itself.
        mesh_axis: as in `scale_by_tekfac`.

    Returns:
        A pytree of `NamedSharding` in the structure of `opt_state`.

    Raises:
        ValueError: `mesh_axis` is not an axis of the mesh, or its number of devices does not
            divide 7,680.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> tx = tekfac.tekfac(0.1, layers, mesh=mesh, shard_state=True)
        >>> shapes = jax.eval_shape(tx.init, params)
        >>> shardings = tekfac.opt_state_sharding(layers, mesh, shapes)
        >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
        >>> tekfac.curvature(opt_state)["params"].q_phi.shape
        (6, 6)
    """
    check_layers(layers)
    axis = check_mesh_axis(mesh, mesh_axis, shard_state=True)
    if opt_state is None:
        opt_state = jax.eval_shape(lambda: initial_state(layers, None, fold=True))

    def specs(node: PyTree) -> PyTree:
        return _specs(node, axis) if is_layer_state(node) else PartitionSpec()

    def is_spec(node: object) -> bool:
        return isinstance(node, PartitionSpec)

    def sharding(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, spec)

    specs_of_all = jax.tree.map(specs, opt_state, is_leaf=is_layer_state)
    return jax.tree.map(sharding, specs_of_all, is_leaf=is_spec)


def _specs(layer: LayerState, axis: AxisName) -> PyTree:
    """A `LayerState` of specs: folded matrices are divided over the axis, the rest replicated."""

    def spec(name: str) -> PyTree:
        if getattr(layer, name) is None:
            return None
        is_divided = name in SQUARES and is_folded(layer, name)
        return PartitionSpec(axis) if is_divided else PartitionSpec()

    return LayerState(*map(spec, LayerState._fields))


def over_mesh(
    refresh: Refresh,
    layers: Layers,
    *,
    due: jax.Array,
    mesh: Mesh,
    mesh_axis: AxisName,
    shard_state: bool,
) -> Refresh:
    """`refresh`, run by each device of a mesh on its part of the batch (and of the state).

    Args:
        refresh: function of the step, the states, the statistics and the number of examples.
        layers: of the whole network.
        due: whether anything will be refreshed; only then is a divided state gathered.
        mesh: the devices.
        mesh_axis: the axes over which the batch is divided.
        shard_state: whether the state is divided over them too.
    """

    def on_each_device(
        step: jax.Array, states: States, stats: StatisticsOfBatch | None, examples: jax.Array,
        due: jax.Array,
    ) -> States:  # fmt: skip
        if not shard_state:
            return refresh(step, states, stats, examples)

        # A divided state is gathered for the refresh and divided again, only if one is due.
        def run(states: States) -> States:
            whole = _gather_parts(states, mesh_axis)
            return _own_parts(refresh(step, whole, stats, examples), mesh_axis)

        return cast(States, lax.cond(due, run, unchanged, states))

    def wrapped(
        step: jax.Array, states: States, stats: StatisticsOfBatch | None, examples: jax.Array
    ) -> States:
        # Captures and folded matrices are divided over the axis; the rest is replicated.
        replicated = PartitionSpec()
        specs = {path: _specs(layer, mesh_axis) for path, layer in states.items()}
        stats_specs = specs_of_statistics(stats, layers, mesh, mesh_axis)
        run = jax.shard_map(
            on_each_device, mesh=mesh,
            in_specs=(replicated, specs, stats_specs, replicated, replicated), out_specs=specs,
            axis_names=set(axis_names(mesh_axis)), check_vma=False,
        )  # fmt: skip
        return run(step, states, stats, examples, due)

    return wrapped


def _gather_parts(states: States, axis: AxisName) -> States:
    """The whole matrices, gathered from each device's part of the folded ones."""

    def whole(layer: LayerState) -> LayerState:
        parts = {name: getattr(layer, name) for name in SQUARES if is_folded(layer, name)}
        gathered = cast(dict[str, jax.Array], lax.all_gather(parts, axis, tiled=True))
        return unfolded(layer._replace(**gathered))

    return {path: whole(layer) for path, layer in states.items()}


def _own_parts(states: States, axis: AxisName) -> States:
    """This device's part of the folded matrices."""
    devices, own = int(cast(int, lax.psum(1, axis))), lax.axis_index(axis)

    def part(layer: LayerState, like: LayerState) -> LayerState:
        matrices: dict[str, jax.Array] = {
            name: getattr(layer, name) for name in SQUARES if is_folded(layer, name)
        }
        parts = {
            name: cast(
                jax.Array, lax.dynamic_index_in_dim(x.reshape(devices, -1), own, keepdims=False)
            )
            for name, x in matrices.items()
        }
        return like._replace(**parts)

    return {path: part(folded(layer), layer) for path, layer in states.items()}


def keep_folded(layer: LayerState, kept: LayerState) -> LayerState:
    """`layer` with its matrices as they are kept, folded or not."""
    return layer._replace(**{name: getattr(kept, name) for name in SQUARES})


def specs_of_statistics(
    stats: StatisticsOfBatch | None, layers: Layers, mesh: Mesh, axis: AxisName
) -> PyTree:
    """Specs for `jax.shard_map`: captures are divided along their examples, sums are replicated.

    Raises:
        ValueError: the devices of the axis cannot divide the batch evenly.
    """
    if not isinstance(stats, Statistics):
        return PartitionSpec()
    devices = math.prod(mesh.shape[name] for name in axis_names(axis))
    for path, captures in stats.layers.items():
        size = captures[0].u.shape[len(layers[path].stack)]
        if size % devices:
            raise ValueError(
                f"a batch of {size} examples cannot be divided among the {devices} devices of mesh "
                f"axis {axis!r}: pad it to a multiple with examples whose loss is multiplied by 0, "
                "and pass the number of real examples to value_grad_and_stats as reduction= and "
                "examples="
            )
    divided: PyTree = {
        path: PartitionSpec(*[None] * len(layers[path].stack), axis) for path in stats.layers
    }
    replicated: PyTree = PartitionSpec()
    return Statistics(divided, replicated, replicated, replicated)


def axis_names(axis: object) -> tuple[str, ...]:
    """The names of one axis, or of several; unchecked."""
    return cast(tuple[str, ...], axis if isinstance(axis, tuple) else (axis,))


def check_mesh_axis(mesh: object, axis: object, *, shard_state: bool) -> AxisName:
    """The axis, or the mesh's first axis for None; raises unless it can be used."""
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if axis is None:
        axis = mesh.axis_names[0]
    if isinstance(axis, list):
        raise ValueError(f"mesh_axis must be a name or a tuple of names, got {axis!r}")
    if not _is_axis_of(axis, mesh):
        raise ValueError(f"mesh_axis must be among the mesh's {mesh.axis_names}, got {axis!r}")
    devices = math.prod(mesh.shape[name] for name in axis_names(axis))
    if shard_state and FOLD % devices:
        raise ValueError(
            f"shard_state=True needs a number of devices that divides {FOLD}, but mesh axis "
            f"{axis!r} has {devices}; leave shard_state=True out, or use fewer devices"
        )
    return axis


def _is_axis_of(axis: object, mesh: Mesh) -> TypeGuard[AxisName]:
    """Whether it is the name of one axis of the mesh, or of several, each once."""
    names = cast(tuple[object, ...], axis) if isinstance(axis, tuple) else (axis,)
    are_known = all(isinstance(name, str) and name in mesh.axis_names for name in names)
    return bool(names) and are_known and len(set(names)) == len(names)
