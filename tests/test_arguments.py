"""Argument checks: what they accept, and errors that give name, value, range and remedy."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tekfac_jax import _arguments

REMEDY = "use 0.5"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-0.1, "-0.1"),
        (1.0, "1.0"),
        (float("nan"), "nan"),
        (False, "False"),
        ("half", "'half'"),
        (None, "None"),
        (np.float32(2.0), "2.0"),
        (jnp.asarray(-1), "-1"),
        (jnp.zeros(2), "Array([0., 0.]"),
    ],
)
def test_numbers_out_of_range(value, shown):
    message = re.escape(f"rate must be a number in [0, 1), got {shown}") + ".*; use 0.5"
    with pytest.raises(ValueError, match=message):
        _arguments.check_number("rate", value, 0, 1, REMEDY)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(0), jnp.asarray(0.5)])
def test_numbers_within_range(value):
    _arguments.check_number("rate", value, 0, 1, REMEDY)


@pytest.mark.parametrize("value", [0, 0.0, 1e-40, float("inf"), 1e39])
def test_numbers_in_an_open_range_are_those_of_float32(value):
    """Values that underflow or overflow float32 are refused."""
    message = re.escape(f"rate must be a number in (0, inf), got {value!r}; {REMEDY}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        _arguments.check_number("rate", value, 0, float("inf"), REMEDY, open_low=True)
    _arguments.check_number("rate", 1e-37, 0, float("inf"), REMEDY, open_low=True)


def test_integers_beyond_int32_must_be_floats():
    limit = _arguments.LARGEST_INTEGER
    _arguments.check_number("rate", limit, 0, float("inf"), REMEDY)
    _arguments.check_number("rate", float(limit + 1), 0, float("inf"), REMEDY)
    message = rf"^rate is too large for an integer, got {limit + 1}; pass a float; use 0\.5$"
    with pytest.raises(ValueError, match=message):
        _arguments.check_number("rate", limit + 1, 0, float("inf"), REMEDY)


@pytest.mark.parametrize(
    ("value", "accepted"),
    [(7.0, True), (7, True), (True, False), (1j, False), (np.ones(1, np.float32), False)],
    ids=repr,
)
def test_traced_numbers_have_no_value_to_check(value, accepted):
    """A real scalar passes whatever its value; anything else is refused."""

    def check(x):
        _arguments.check_number("rate", x, 0, 1, REMEDY)
        return x

    if accepted:
        jax.jit(check)(value)
        return
    with pytest.raises(ValueError, match=r"rate must be a number in \[0, 1\), got .*; use 0\.5"):
        jax.jit(check)(value)


@pytest.mark.parametrize("value", [1, None, "yes", np.ones(1, bool)])
def test_flags(value):
    message = re.escape(f"nesterov must be True or False, got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        _arguments.check_flag("nesterov", value)
    for flag in (True, np.bool_(False)):
        _arguments.check_flag("nesterov", flag)


@pytest.mark.parametrize("value", [1, None, "yes", np.ones(1, bool), jnp.zeros(())])
def test_conditions(value):
    message = re.escape(f"when must be a boolean or a scalar boolean array, got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        _arguments.check_condition("when", value)

    def check(x):
        _arguments.check_condition("when", x)
        return x

    for condition in (True, np.bool_(False), jnp.asarray(True)):
        check(condition)
        jax.jit(check)(condition)


@pytest.mark.parametrize("value", ["both", "LEFT", 1, None, ["left"]])
def test_choices(value):
    listed = re.escape('side must be one of "left", "right"')
    shown = re.escape(f", got {value!r}")
    with pytest.raises(ValueError, match=f"^{listed}{shown}$"):
        _arguments.check_choice("side", value, ("left", "right"))
    with pytest.raises(ValueError, match=f"^{listed} or a number{shown}$"):
        _arguments.check_choice("side", value, ("left", "right"), "or a number")
    _arguments.check_choice("side", "left", ("left", "right"))


@pytest.mark.parametrize(
    "value",
    [None, optax.adam, types.SimpleNamespace(init=len), types.SimpleNamespace(update=len)],
    ids=["None", "a factory", "init alone", "update alone"],
)
def test_transformations(value):
    message = re.escape("fallback must be an optax transformation, such as optax.adam(1e-3), got ")
    with pytest.raises(ValueError, match=f"^{message}{re.escape(repr(value))}$"):
        _arguments.check_transformation("fallback", value)
    _arguments.check_transformation("fallback", optax.sgd(0.1))


@pytest.mark.parametrize("value", [None, "loss", 1.0])
def test_functions(value):
    message = rf"^loss must be a function of \(params, .*\), got {type(value).__name__}$"
    with pytest.raises(ValueError, match=message):
        _arguments.check_function("loss", value)
    _arguments.check_function("loss", lambda params: 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: 0,
        lambda: jnp.zeros((), jnp.uint32),
        lambda: jnp.zeros(2),
        lambda: jax.random.split(jax.random.key(0), 2),
        lambda: jax.random.split(jax.random.PRNGKey(0), 2),
    ],
    ids=["None", "0", "scalar", "floats", "several", "several of the old style"],
)
def test_random_keys(make):
    key = make()
    message = re.escape(f"key must be one random key, such as jax.random.key(0), got {key!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        _arguments.check_key(key)
    for right in (jax.random.key(0), jax.random.PRNGKey(0), np.zeros(2, np.uint32)):
        _arguments.check_key(right)


@pytest.mark.parametrize("value", [np.float32(0.5), np.asarray(0.5), jnp.asarray(0.5)], ids=repr)
def test_scalars_become_python_numbers(value):
    assert type(_arguments.as_python(value)) is float
    assert _arguments.as_python(value) == 0.5


def test_other_values_stay_as_they_are():
    for value in ("half", None, 3, np.ones(2), jax.random.key(0)):
        assert _arguments.as_python(value) is value
