"""What an argument may be: each check raises a ValueError with name, value, range and remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LARGEST_INTEGER = 2**31 - 1  # what is counted, steps and examples, is counted in int32


def check_number(
    name: str, value: Any, low: float, high: float, remedy: str, *, open_low: bool = False
) -> None:
    """Raises unless `value` is a traced scalar, or in [low, high), (low, high) with `open_low`.

    What float32 rounds to an infinity is none of these numbers, nor, with `open_low`, to a zero.
    """
    value = as_python(value)
    if isinstance(value, Tracer) and value.shape == () and _is_real(value):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(value, int) and low <= value < high and value > LARGEST_INTEGER:
        raise ValueError(f"{name} must be a float where it is so large, got {value!r}; {remedy}")
    least = low + _SMALLEST if open_low else low
    if not number or not least <= value < min(high, _LARGEST):
        bracket = "(" if open_low else "["
        raise ValueError(
            f"{name} must be a number in {bracket}{low}, {high}), got {value!r}; {remedy}"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_condition(name: str, value: Any) -> None:
    """Raises unless `value` is a boolean, traced or not."""
    is_array = isinstance(value, jax.Array | np.ndarray) and value.shape == ()
    if not (is_array and value.dtype == bool) and not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be a boolean, or a scalar array of one, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...], also: str = "") -> None:
    """Raises unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be one of {listed} {also}".rstrip() + f", got {value!r}")


def check_transformation(name: str, value: Any) -> None:
    """Raises unless `value` is an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise ValueError(
            f"{name} must be an optax transformation, such as optax.adam(1e-3), got {value!r}"
        )


def as_python(value: Any) -> Any:
    """A scalar array or numpy scalar as a Python number; anything else as it is."""
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array)
    if not is_array or isinstance(value, Tracer) or value.shape != ():
        return value
    # A random key is a scalar array too, and no number.
    return value if jnp.issubdtype(value.dtype, jax.dtypes.extended) else value.item()


def _is_real(x: Any) -> bool:
    return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))


def check_function(name: str, value: Any) -> None:
    """Raises unless `value` can be called."""
    if not callable(value):
        raise ValueError(
            f"{name} must be a function of (params, *args, **kwargs), got {type(value).__name__}"
        )


def check_key(key: Any) -> None:
    """Raises unless it is a random key of JAX, of the new style or the old."""
    dtype = getattr(key, "dtype", None)
    new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (
        not isinstance(key, jax.Array | np.ndarray)
        or key.ndim != (0 if new else 1)
        or not (new or dtype == jnp.uint32)
    ):
        raise ValueError(f"key must be one random key, such as jax.random.key(0), got {key!r}")
