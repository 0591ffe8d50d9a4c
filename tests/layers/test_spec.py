"""`Layers` is a static argument, and prints a table of every parameter."""

import functools
import re

import flax.linen as nn
import jax
import pytest

import tekfac_jax as tekfac
from tests.capturing import (
    Net,
    assert_model_is_exact,
    attention_case,
    mlp_case,
    randn,
    simple_case,
    x64,
)


def test_layers_are_static_arguments():
    loss, params, x = mlp_case()
    layers, again = (tekfac.find_layers(loss, params, x) for _ in range(2))
    assert layers == again
    assert hash(layers) == hash(again)
    assert len({layers, again}) == 1
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(layers, params, x):
        traces.append(layers)
        return tekfac.value_grad_and_stats(loss, layers)(params, x)

    step(layers, params, x)
    step(again, params, x)
    assert len(traces) == 1
    other = tekfac.find_layers(loss, params, x, skip="Dense_0")
    assert other != layers
    with pytest.raises(KeyError):
        layers["nowhere"]


# --- the table -----------------------------------------------------------------------------------


def test_table_lists_every_parameter():
    loss, params, x = attention_case()
    layers = tekfac.find_layers(loss, params, x, skip=lambda path: path.endswith("out"))
    text = repr(layers)
    uncovered = dict(layers.uncovered)
    for key_path, _ in jax.tree_util.tree_leaves_with_path(params):
        path = "/".join(key.key for key in key_path)
        home = path.rpartition("/")[0]
        assert (home in layers) != (path in uncovered)
        listed = path if path in uncovered else home
        assert re.search(rf"^ *{re.escape(listed)}[ :]", text, re.MULTILINE)
    assert "skipped" in uncovered["MultiHeadDotProductAttention_0/out/kernel"]
    assert "LayerNorm" in uncovered["LayerNorm_0/scale"]
    with pytest.raises(ValueError, match="skip must be"):
        tekfac.find_layers(loss, params, x, skip=3)  # pyright: ignore[reportArgumentType]


@x64
def test_positions_in_the_table_are_those_of_one_example():
    x = randn(5, 6, 4, 2)
    net = Net(lambda x: nn.Dense(2)(nn.Conv(3, (2, 2), strides=2)(x)))
    layers = assert_model_is_exact(net, x)
    assert [spec.positions for spec in layers.values()] == [6, 6]


def test_number_of_examples_is_shown():
    """The number reveals a batch axis that is not the leading one."""
    loss, params, x, layers = simple_case()
    assert layers.batch_size == 6
    assert repr(layers).splitlines()[3].endswith("bytes of state, seen with 6 examples")
    turned = tekfac.find_layers(lambda p, x: loss(p, x.reshape(-1, 4)), params, x.reshape(2, 3, 4))
    assert turned.batch_size == 6
