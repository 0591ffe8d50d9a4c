"""The page on the code's layout: its table is the one that is held, its walks are what is called."""

import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import tekfac_jax as tekfac
from tests.test_package import PACKAGE, ROOMS

PAGE = (PACKAGE.parent / "docs" / "layout.md").read_text()


def test_the_table_is_the_one_that_is_held():
    rows = re.findall(r"^\| `(_\w+)(?:/|\.py)` \| .* \| (.*) \|$", PAGE, flags=re.M)
    assert [room for room, _ in rows] == [room for room in ROOMS if room.startswith("_a") or
                                          (PACKAGE / room).is_dir()]  # fmt: skip
    for room, may_import in rows:
        named = set(re.findall(r"`(_\w+)`", may_import))
        if may_import.startswith("all but"):
            named = {name for name, _ in rows} - named - {room}
        assert named == ROOMS[room], room


def called(function, *args):
    """Functions of the package in the order in which they are first called."""
    found: dict[str, None] = {}

    def notice(frame, event, arg):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)):
            module = Path(file).relative_to(PACKAGE).with_suffix("").parts
            name = frame.f_code.co_qualname.partition(".<locals>")[0]
            found.setdefault(".".join((*module, name)))

    sys.setprofile(notice)
    try:
        jax.eval_shape(function, *args)
    finally:
        sys.setprofile(None)
    return list(found)


class Net(nn.Module):
    """A convolution and a dense layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(4, (3, 3))(x)).mean(axis=(1, 2)))


def walks():
    model, x = Net(), jnp.ones((8, 6, 6, 2))
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    layers = tekfac.find_layers(loss, params, x)
    tx = tekfac.scale_by_tekfac(layers)
    grad_fn = tekfac.value_grad_and_stats(loss, layers)
    _, grads, stats = grad_fn(params, x)
    state = tx.init(params)
    return {
        "One call of `value_grad_and_stats`": called(grad_fn, params, x),
        "One `update`": called(
            lambda grads, state, stats: tx.update(grads, state, stats=stats), grads, state, stats
        ),
    }


@pytest.mark.parametrize("heading", ["One call of `value_grad_and_stats`", "One `update`"])
def test_the_walk_is_what_is_called(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (`.*`) \|$", section, flags=re.M)
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(named) > 8
    order = walks()[heading]
    assert [name for name in named if name not in order] == []
    places = [order.index(name) for name in named]
    assert places == sorted(places), [order[place] for place in sorted(places)]
