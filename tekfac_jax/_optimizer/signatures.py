"""Signatures: one list of arguments for the whole family, and what optax reads from it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Integers that Python needs as integers, to set shapes or to plan steps.
_COUNTS = frozenset(
    {"factor_interval", "eigenbasis_interval", "rescaling_interval", "statistics_examples",
     "basis_rank", "max_dim", "max_failures"}
)  # fmt: skip

# Objects that may be callable but are not schedules.
_OBJECTS = frozenset({"mesh", "factor_dtype"})


class Static(NamedTuple):
    """An argument that must reach the factory unchanged."""

    value: Any


class FamilySignature(inspect.Signature):
    """A signature that keeps integers, dtypes and meshes out of `optax.inject_hyperparams`.

    That function binds the arguments with the factory's signature. It turns every number into an
    array and takes every callable for a schedule. `bind` therefore wraps such arguments in
    `Static`, which optax passes on unchanged, so that users need no `static_args`.
    """

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """As `inspect.Signature.bind`, defaults included."""
        bound = super().bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            is_count = name in _COUNTS and isinstance(value, int | float)
            is_object = name in _OBJECTS and value is not None
            if is_count or is_object:
                bound.arguments[name] = Static(value)
        return bound


def unwrapped(value: Any) -> Any:
    """The argument inside a `Static`; any other argument unchanged."""
    return value.value if isinstance(value, Static) else value


def family_signature(function: Callable[P, R]) -> Callable[P, R]:
    """Gives a function a `FamilySignature` of its own arguments."""
    _sign(function, inspect.signature(function).parameters.values())
    return function


def same_arguments_as(
    template: Callable[P, R],
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a function that takes ``**options`` the signature of `template`.

    Then help() and type checkers show every argument, and `optax.inject_hyperparams`, which reads
    the signature, finds them.
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        _sign(function, inspect.signature(template).parameters.values())
        return function

    return decorate


def also_arguments_of(template: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Replaces ``**options`` in a function's signature by the keyword arguments of `template`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function).parameters.values()
        more = inspect.signature(template).parameters.values()
        parameters = [p for p in own if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in parameters}
        parameters += [p for p in more if p.kind is p.KEYWORD_ONLY and p.name not in known]
        _sign(function, parameters)
        return function

    return decorate


def _sign(function: Callable[..., Any], parameters: Any) -> None:
    signature = FamilySignature(list(parameters))
    function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a function, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
