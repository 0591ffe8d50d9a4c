"""Where the optimizer's state lies on a mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tekfac_jax._layers.spec import Layers, check_layers
from tekfac_jax._layers.statistics import Statistics, StatisticsOfBatch
from tekfac_jax._layers.types import AxisName
from tekfac_jax._state.folding import FOLD, SQUARES, folded, is_folded, unfolded
from tekfac_jax._state.initial import initial_state
from tekfac_jax._state.layout import LayerState

States = dict[str, LayerState]
Refresh = Callable[[jax.Array, States, StatisticsOfBatch | None, jax.Array], States]


def opt_state_sharding(
    layers: Layers, mesh: jax.sharding.Mesh, opt_state: Any = None, *, mesh_axis: Any = None
) -> Any:
    """Shardings of an optimizer's state, for `jit`, `jax.device_put` and checkpoints.

    Factors and eigenvectors are divided over the mesh axis where they are folded
    (``shard_state=True``); everything else is on every device.

    Args:
        layers: from `find_layers`.
        mesh: the mesh.
        opt_state: an optax state with ours inside, or its shapes (``jax.eval_shape(tx.init,
            params)``); None: the state of ``scale_by_tekfac(layers, mesh=mesh, shard_state=True)``
            by itself. What is not ours lies on every device.
        mesh_axis: as in `scale_by_tekfac`.

    Returns:
        A pytree of `NamedSharding` in the structure of `opt_state`.

    Raises:
        ValueError: `mesh_axis` is no axis of the mesh, or the number of its devices does not
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

    def is_ours(node: Any) -> bool:
        return isinstance(node, LayerState)

    def specs(node: Any) -> Any:
        return _specs(node, axis) if is_ours(node) else PartitionSpec()

    specs_of_all = jax.tree.map(specs, opt_state, is_leaf=is_ours)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs_of_all,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )  # fmt: skip


def _specs(layer: LayerState, axis: Any) -> Any:
    """Folded matrices are divided over the axis, everything else is on every device."""

    def spec(name: str) -> PartitionSpec | None:
        if getattr(layer, name) is None:
            return None
        divided = name in SQUARES and is_folded(layer, name)
        return PartitionSpec(axis) if divided else PartitionSpec()

    specs: Any = map(spec, LayerState._fields)
    return LayerState(*specs)


def over_mesh(
    refresh: Refresh,
    layers: Layers,
    *,
    due: jax.Array,
    mesh: jax.sharding.Mesh,
    mesh_axis: AxisName,
    shard_state: bool,
) -> Refresh:
    """`refresh`, run by each device of a mesh on its part of the batch (and of the state).

    Args:
        refresh: function of the step, the states, the statistics and the number of examples.
        layers: of the whole network.
        due: whether anything will be refreshed; only then is a divided state gathered.
        mesh: the devices.
        mesh_axis: the axes that divide the batch.
        shard_state: whether they divide the state too.
    """

    def gathered(
        step: jax.Array, states: States, stats: StatisticsOfBatch | None, examples: jax.Array,
        due: jax.Array,
    ) -> States:  # fmt: skip
        if not shard_state:
            return refresh(step, states, stats, examples)

        def run(states: States) -> States:
            together = _gather_parts(states, mesh_axis)
            return _own_parts(refresh(step, together, stats, examples), mesh_axis)

        return lax.cond(due, run, lambda states: states, states)

    def wrapped(
        step: jax.Array, states: States, stats: StatisticsOfBatch | None, examples: jax.Array
    ) -> States:
        whole = PartitionSpec()
        specs = {path: _specs(layer, mesh_axis) for path, layer in states.items()}
        stats_specs = specs_of_statistics(stats, layers, mesh, mesh_axis)
        run = jax.shard_map(
            gathered, mesh=mesh,
            in_specs=(whole, specs, stats_specs, whole, whole), out_specs=specs,
            axis_names=set(axis_names(mesh_axis)), check_vma=False,
        )  # fmt: skip
        return run(step, states, stats, examples, due)

    return wrapped


def _gather_parts(states: States, axis: Any) -> States:
    """The whole matrices, from each device's part of the folded ones."""

    def whole(layer: LayerState) -> LayerState:
        parts = {name: getattr(layer, name) for name in SQUARES if is_folded(layer, name)}
        return unfolded(layer._replace(**lax.all_gather(parts, axis, tiled=True)))

    return {path: whole(layer) for path, layer in states.items()}


def _own_parts(states: States, axis: Any) -> States:
    """Each device's part of the matrices, folded."""
    devices, own = int(lax.psum(1, axis)), lax.axis_index(axis)

    def part(layer: LayerState, like: LayerState) -> LayerState:
        parts = {
            name: lax.dynamic_index_in_dim(
                getattr(layer, name).reshape(devices, -1), own, keepdims=False
            )
            for name in SQUARES
            if is_folded(layer, name)
        }
        return like._replace(**parts)

    return {path: part(folded(layer), layer) for path, layer in states.items()}


def keep_folded(layer: LayerState, kept: LayerState) -> LayerState:
    """`layer` with the matrices as they are kept, folded or not."""
    return layer._replace(**{name: getattr(kept, name) for name in SQUARES})


def specs_of_statistics(stats: Any, layers: Layers, mesh: jax.sharding.Mesh, axis: Any) -> Any:
    """For `jax.shard_map`: captures are split along their examples; sums are whole.

    Raises:
        ValueError: the batch cannot be divided among the devices of the axis.
    """
    if not isinstance(stats, Statistics):
        return PartitionSpec()
    devices = math.prod(mesh.shape[name] for name in axis_names(axis))
    for path, captures in stats.layers.items():
        size = captures[0].u.shape[len(layers[path].stack)]
        if size % devices:
            raise ValueError(
                f"a batch of {size} examples cannot be divided among the {devices} devices of mesh "
                f"axis {axis!r}: fill it up to a multiple with examples whose loss is multiplied "
                "by 0, and pass the number of the others to value_grad_and_stats as reduction= "
                "and examples="
            )
    parts: Any = {
        path: PartitionSpec(*[None] * len(layers[path].stack), axis) for path in stats.layers
    }
    whole: Any = PartitionSpec()
    return Statistics(parts, whole, whole, whole)


def axis_names(axis: Any) -> tuple[str, ...]:
    """The names of one axis, or of several."""
    return axis if isinstance(axis, tuple) else (axis,)


def check_mesh_axis(mesh: Any, axis: Any, *, shard_state: bool) -> Any:
    """The axis, or the mesh's first for None; raises unless it is one that can be used."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if axis is None:
        axis = mesh.axis_names[0]
    if isinstance(axis, list):
        raise ValueError(f"mesh_axis must be a name or a tuple of names, got {axis!r}")
    names = axis_names(axis)
    known = all(isinstance(name, str) and name in mesh.axis_names for name in names)
    if not names or not known or len(set(names)) < len(names):
        raise ValueError(f"mesh_axis must be among the mesh's {mesh.axis_names}, got {axis!r}")
    devices = math.prod(mesh.shape[name] for name in names)
    if shard_state and FOLD % devices:
        raise ValueError(
            f"a state can be divided among a number of devices that divides {FOLD}, mesh axis "
            f"{axis!r} has {devices}; leave shard_state=True out, or use fewer devices"
        )
    return axis
