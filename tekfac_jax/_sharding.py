"""Where the optimizer's state lies on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tekfac_jax._devices import axis_names, specs_of_statistics
from tekfac_jax._layers import Layers, check_layers
from tekfac_jax._options import Options, check_mesh_axis
from tekfac_jax._state import SQUARES, LayerState, folded, initial_state, is_folded, unfolded


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


def over_mesh(refresh: Callable[..., Any], layers: Layers, options: Options) -> Callable[..., Any]:
    """`refresh`, run by each device of a mesh on its part of the batch (and of the state)."""
    mesh, axis, whole = options.mesh, options.mesh_axis, PartitionSpec()

    def gathered(step: Any, due: Any, states: Any, stats: Any, examples: Any) -> Any:
        """Of a divided state the whole is together while something is refreshed, only then."""

        def run(states: dict[str, LayerState]) -> dict[str, LayerState]:
            together = _gather_parts(states, axis)
            return _own_parts(refresh(step, due, together, stats, examples), axis)

        return lax.cond(due, run, lambda states: states, states)

    def wrapped(step: Any, due: Any, states: Any, stats: Any, examples: Any) -> Any:
        specs = {path: _specs(layer, axis) for path, layer in states.items()}
        stats_specs = specs_of_statistics(stats, layers, mesh, axis)
        run = jax.shard_map(
            gathered if options.shard_state else refresh, mesh=mesh,
            in_specs=(whole, whole, specs, stats_specs, whole), out_specs=specs,
            axis_names=set(axis_names(axis)), check_vma=False,
        )  # fmt: skip
        return run(step, due, states, stats, examples)

    return wrapped


def _gather_parts(states: dict[str, LayerState], axis: Any) -> dict[str, LayerState]:
    """The whole matrices, from each device's part of the folded ones."""

    def whole(layer: LayerState) -> LayerState:
        parts = {name: getattr(layer, name) for name in SQUARES if is_folded(layer, name)}
        return unfolded(layer._replace(**lax.all_gather(parts, axis, tiled=True)))

    return {path: whole(layer) for path, layer in states.items()}


def _own_parts(states: dict[str, LayerState], axis: Any) -> dict[str, LayerState]:
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
