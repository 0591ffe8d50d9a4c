"""Symmetric matrices travel between devices as triangles."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tekfac_jax as tekfac
from tekfac_jax._devices import collectives
from tests.capturing import losses_of, relative_error
from tests.sharing import Network, limited, mesh_of, needs_devices


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("dim", [1, 2, 3, 6, 7])
def test_a_triangle_is_the_whole_matrix(dim, lead):
    x = np.random.default_rng(dim).normal(size=(*lead, dim, dim)).astype(np.float32)
    x = x + np.swapaxes(x, -1, -2)
    packed = collectives._pack(jnp.asarray(x))
    np.testing.assert_array_equal(collectives._unpack(packed), x)
    numbers = sum(part.size for part in jax.tree.leaves(packed)) // math.prod(lead)
    k = (dim + 1) // 2
    assert numbers <= dim * (dim + 1) // 2 + k


@pytest.mark.slow
@needs_devices
@limited
def test_a_vector_is_no_triangle():
    """Three stacked embeddings of three rows each: Φ has a square shape, but is no matrix."""
    tables = nn.vmap(
        nn.Embed, in_axes=None, out_axes=1, axis_size=3, variable_axes={"params": 0},
        split_rngs={"params": True},
    )  # fmt: skip
    model, ids = tables(3, 2), jnp.asarray([0, 1, 2, 2])
    params = model.init(jax.random.key(0), ids)["params"]

    def loss(params, ids):
        return losses_of(model.apply({"params": params}, ids)).mean()

    layers = tekfac.find_layers(loss, params, ids)

    def delta(**options):
        tx = tekfac.scale_by_tkfac(layers, **options)

        @jax.jit
        def run(params, ids):
            _, grads, stats = tekfac.value_grad_and_stats(loss, layers)(params, ids)
            return tx.update(grads, tx.init(params), stats=stats)[1]

        (found,) = tekfac.curvature(run(params, ids)).values()
        return found.delta

    assert relative_error(delta(mesh=mesh_of(2)), delta()) <= 1e-5


@needs_devices
@limited
def test_only_triangles_of_factors_travel():
    """The shapes that the step sums over devices are those of triangles."""
    layers = Network().layers
    i = layers["hidden"].in_dim
    assert i > layers["hidden"].out_dim
    network = Network(eigenbasis_interval=1)
    tx = network.transform(axis_name="data")
    run = jax.shard_map(
        network.step(tx, functools.partial(jax.lax.pmean, axis_name="data")), mesh=mesh_of(4),
        in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False,
    )  # fmt: skip
    jaxpr = jax.make_jaxpr(run)(network.params, tx.init(network.params), network.x)
    sizes = [v.aval.shape for eqn in psums(jaxpr.jaxpr) for v in eqn.invars]
    halves = ((i + 1) // 2, (i + 1) // 2)
    assert sizes.count((i, i)) == 1  # the basis; the factor travels as a triangle
    assert halves in sizes


def psums(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("psum"):
            yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from psums(inner)
