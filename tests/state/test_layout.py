"""The arrays of a state: shapes, sizes, and checkpoints."""

import inspect
import re

import jax
import numpy as np
import optax
import pytest
from flax import serialization

import tekfac_jax as tekfac
from tests.conforming import (
    SCALE_BY,
    assert_same,
    case,
    every_transform,
    make,
    our_state,
    reference,
    standard_promotion,
    types,
)

pytestmark = standard_promotion


def test_shape_comments_are_true():
    """The shapes in the comments of `LayerState` and `ScaleByTekfacState` are the real ones."""
    (_, state) = reference("scale_by_tekfac")
    state = our_state(state)
    for path, spec in case().layers.items():
        dims = {"i": spec.in_dim, "o": spec.out_dim}
        for node in (state.layers[path], state, state.meaning):
            comments = re.findall(
                r"^    (\w+): [^#\n]*jax\.Array[^#\n]*#.*?\(([io\d, ]*)\)",
                inspect.getsource(type(node)),
                re.M,
            )
            arrays = [
                f
                for f, t in type(node).__annotations__.items()
                if jax.Array in getattr(t, "__args__", (t,))
            ]
            assert [field for field, _ in comments] == arrays
            for field, comment in comments:
                names = [d.strip() for d in comment.split(",") if d.strip()]
                shape = tuple(int(d) if d.isdigit() else dims[d] for d in names)
                assert getattr(node, field).shape == shape, field


@pytest.mark.parametrize("name", SCALE_BY)
def test_memory_usage_is_that_of_the_arrays(name):
    state = reference(name)[1]
    usage = tekfac.memory_usage(optax.chain(make(name)).init(case().params))
    assert usage == tekfac.memory_usage(jax.eval_shape(make(name).init, case().params))
    for path, layer in state.layers.items():
        actual = {
            "factors": layer.phi.nbytes + layer.psi.nbytes,
            "eigenbasis": layer.q_phi.nbytes + layer.q_psi.nbytes,
            "rescaling": layer.theta.nbytes,
        }
        assert usage[path] == actual
        assert sum(actual.values()) == case().layers[path].state_bytes


@every_transform
def test_flax_serialization(name):
    state = reference(name)[1]
    state_dict = jax.tree.map(np.asarray, serialization.to_state_dict(state))
    restored = serialization.from_state_dict(make(name).init(case().params), state_dict)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    as_bytes = serialization.to_bytes(state)
    assert_same(serialization.from_bytes(make(name).init(case().params), as_bytes), state)


@every_transform
@pytest.mark.filterwarnings("ignore")
def test_orbax(name, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    state = reference(name)[1]
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(make(name).init, case().params)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    assert types(restored) == types(state)
    assert tekfac.check_state(restored, case().layers) == ""
