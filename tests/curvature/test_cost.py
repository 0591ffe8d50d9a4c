"""The chosen order of contraction is the cheapest, by our count and by XLA's."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tekfac_jax._curvature import dense
from tekfac_jax._curvature.cost import FactorOrder, RescalingOrder, factor_order, rescaling_order

DIMS = st.integers(1, 3000)
ORDERS = tuple(itertools.product((False, True), repeat=2))


@settings(max_examples=200)
@given(t=st.integers(2, 2000), i=DIMS, o=DIMS, r=DIMS, p=DIMS)
def test_no_order_is_cheaper_than_the_one_that_is_taken(t, i, o, r, p):
    r, p = min(r, i), min(p, o)
    taken = factor_order(t, i, o).cost(t, i, o)
    assert taken == min(FactorOrder(*order).cost(t, i, o) for order in ORDERS)
    taken = rescaling_order(t, i, o, r, p).cost(t, i, o, r, p)
    assert taken == min(RescalingOrder(*order).cost(t, i, o, r, p) for order in ORDERS)


# (positions, inputs, outputs) of early and late layers of ResNet20 and of half-width VGG16.
SHAPES = [(1024, 144, 16), (64, 576, 64), (16, 2304, 256), (4, 2304, 256)]


def flops(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("t", "i", "o"), SHAPES)
def test_what_is_computed_costs_what_the_order_says(t, i, o):
    """XLA counts the flops of the compiled program: 2 for a multiplication and an addition.

    The factor of 1.5 leaves room for sums, copies and symmetry. A wrong order, such as always
    forming G, costs 2 to 60 times as much in layers with few positions.
    """
    n = 2
    a, u = (n, t, i), (n, t, o)
    counted = flops(dense.exact_factors, a, u)
    assert counted <= 1.5 * 2 * n * factor_order(t, i, o).cost(t, i, o)
    for r, p in ((i, o), (-(-i // 8), -(-o // 4))):
        counted = flops(dense.rescaling, a, u, (i, r), (o, p))
        # Few positions are contracted in pairs: more multiplications, but one matrix product.
        pairs = 2 * n * t * t * r * p if t <= dense._FEW else 0
        assert counted <= 1.5 * 2 * n * rescaling_order(t, i, o, r, p).cost(t, i, o, r, p) + pairs


def test_late_layers_never_form_the_gradient():
    assert factor_order(4, 2304, 256) == FactorOrder(False, False)
    assert rescaling_order(4, 2304, 256, 288, 64) == RescalingOrder(True, True)
    assert factor_order(1024, 144, 16) == FactorOrder(True, True)
    assert rescaling_order(1024, 144, 16, 144, 16) == RescalingOrder(False, False)
