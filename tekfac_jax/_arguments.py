"""What an argument may be: each check raises a ValueError with name, value, range and remedy."""

from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LARGEST_INTEGER = 2**31 - 1  # steps and examples are counted in int32


def check_number(
    name: str, value: object, low: float, high: float, remedy: str, *, open_low: bool = False
) -> None:
    """Raises unless `value` is a traced scalar, or in [low, high), (low, high) with `open_low`.

    Values that overflow float32 are refused and so are, with `open_low`, those that underflow it.
    """
    value = as_python(value)
    if _is_tracer(value) and value.shape == () and _is_real(value):
        return
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if isinstance(number, int) and low <= number < high and number > LARGEST_INTEGER:
        raise ValueError(
            f"{name} is too large for an integer, got {value!r}; pass a float; {remedy}"
        )
    least = low + _SMALLEST if open_low else low
    if number is None or not least <= number < min(high, _LARGEST):
        bracket = "(" if open_low else "["
        raise ValueError(
            f"{name} must be a number in {bracket}{low}, {high}), got {value!r}; {remedy}"
        )


def check_flag(name: str, value: object) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_condition(name: str, value: object) -> None:
    """Raises unless `value` is a boolean, traced or not."""
    is_boolean = _is_scalar_array(value) and value.dtype == bool
    if not is_boolean and not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be a boolean or a scalar boolean array, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...], also: str = "") -> None:
    """Raises unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be one of {listed} {also}".rstrip() + f", got {value!r}")


def check_transformation(name: str, value: object) -> None:
    """Raises unless `value` is an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise ValueError(
            f"{name} must be an optax transformation, such as optax.adam(1e-3), got {value!r}"
        )


def as_python(value: object) -> object:
    """A scalar array or NumPy scalar as a Python number; anything else unchanged."""
    if _is_tracer(value) or not _is_scalar_array(value):
        return value
    # A random key is a scalar array too, but not a number.
    return value if jnp.issubdtype(value.dtype, jax.dtypes.extended) else value.item()


def _is_tracer(value: object) -> TypeGuard[jax.Array]:
    """Whether the value is known only when a traced function runs."""
    return isinstance(value, Tracer)


def _is_scalar_array(value: object) -> TypeGuard[jax.Array]:
    """Whether it is an array of JAX or NumPy, or a NumPy scalar, of shape ()."""
    shape = getattr(value, "shape", None)
    return isinstance(value, np.generic | np.ndarray | jax.Array) and shape == ()


def _is_real(x: jax.Array) -> bool:
    return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))


def check_function(name: str, value: object) -> None:
    """Raises unless `value` can be called."""
    if not callable(value):
        raise ValueError(
            f"{name} must be a function of (params, *args, **kwargs), got {type(value).__name__}"
        )


def check_key(key: object) -> None:
    """Raises unless `key` is a JAX random key, new-style or old-style."""
    dtype = getattr(key, "dtype", None)
    is_new_style = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (
        not isinstance(key, jax.Array | np.ndarray)
        or key.ndim != (0 if is_new_style else 1)
        or not (is_new_style or dtype == jnp.uint32)
    ):
        raise ValueError(f"key must be one random key, such as jax.random.key(0), got {key!r}")
