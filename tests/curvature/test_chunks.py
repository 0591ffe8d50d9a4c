"""Sums over chunks of examples stay within the budget and equal the sum over the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tekfac_jax._curvature import chunks, dense
from tekfac_jax._curvature.chunks import sum_over_examples
from tekfac_jax._curvature.dense import exact_factors
from tekfac_jax._curvature.normal_form import normal_form
from tekfac_jax._layers.spec import LayerSpec
from tekfac_jax._layers.statistics import Capture
from tests.capturing import x64
from tests.oracles import make_case, relative

EXACT = 1e-12
DIMS = st.integers(1, 3000)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 4096), t=st.integers(1, 4096), i=DIMS, o=DIMS)
def test_a_chunk_stays_within_its_budget(n, t, i, o):
    """The budget is for a, u and G_n of the examples; a single example may exceed it."""
    spec = LayerSpec(
        path="layer", kind="dense", kernel_shape=(i, o), contracted=1, use_bias=False,
        dtype="float32", axes=(-1,),
    )  # fmt: skip
    shapes = [jax.ShapeDtypeStruct((n, t, d), jnp.float32) for d in (i, o)]
    size = chunks.chunk_size(spec, (Capture(*shapes),))
    assert 1 <= size <= n
    if t > 1 and size > 1:
        assert size * (t * (i + o) + i * o) <= chunks._NUMBERS
    if t > 1 and n * (t * (i + o) + i * o) <= chunks._NO_LOOP:
        assert size == n


@x64
@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 20), size=st.integers(1, 20), axis=st.integers(0, 1))
def test_a_sum_in_chunks(n, size, axis):
    x = jnp.moveaxis(jnp.asarray(np.random.default_rng(n).normal(size=(n, 3))), 0, axis)
    found = jax.jit(
        lambda x: chunks.sum_in_chunks(lambda x: jnp.sum(x**2, axis=axis), x, axis, size)
    )(x)
    assert relative(found, np.sum(np.asarray(x) ** 2, axis=axis)) <= EXACT


@pytest.mark.sampled
@x64
@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
def test_gradients_in_chunks_are_in_order(size, monkeypatch):
    case = make_case("conv strided")
    layers = case.layers()
    _, stats = case.grads_and_stats(layers)
    spec, captures = layers[case.path], stats.layers[case.path]
    args = dense.gradients, spec, captures, stats.scale, jnp.float64
    whole = chunks.map_over_examples(*args)
    monkeypatch.setattr(chunks, "chunk_size", lambda *_: size)
    assert relative(chunks.map_over_examples(*args), whole) <= EXACT


@pytest.mark.slow
@x64
@pytest.mark.parametrize("n", [1, 7, 8, 9, 21])
def test_chunks_of_examples_add_up(n):
    case = make_case("conv strided")
    x, y = (jnp.concatenate([v, v])[:n] for v in (case.x, case.y))
    layers = case.layers()
    _, stats = case.grads_and_stats(layers, x, y)
    spec, captures = layers[case.path], stats.layers[case.path]
    total = sum_over_examples(exact_factors, spec, captures, stats.scale, jnp.float64)
    a, u = normal_form(spec, captures[0], jnp.float64)
    whole = exact_factors(a, u * stats.scale)
    assert relative(total.phi, whole.phi) <= EXACT
    assert relative(total.psi, whole.psi) <= EXACT
