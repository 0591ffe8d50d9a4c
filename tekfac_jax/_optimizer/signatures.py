"""Signatures: one list of arguments for the whole family, and what optax reads from it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Options that must be Python values: they set shapes, or can be called without being schedules.
_STATIC = frozenset({"statistics_examples", "basis_rank", "max_dim", "factor_dtype", "mesh"})
_INTERVALS = frozenset({"factor_interval", "eigenbasis_interval", "rescaling_interval"})


class Static(NamedTuple):
    """An argument that must reach the factory unchanged."""

    value: Any


class FamilySignature(inspect.Signature):
    """A signature by which `optax.inject_hyperparams` needs no `static_args`.

    That function binds the arguments with the factory's signature. It turns every number into an
    array and takes every callable for a schedule. `bind` therefore wraps arguments that must stay
    Python values in `Static`, which optax passes on unchanged. With ``stagger=True``, which plans
    with the intervals, they are among these. Anyone else who binds with this signature sees
    `Static` too.
    """

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """As `inspect.Signature.bind`, defaults included."""
        bound = super().bind(*args, **kwargs)
        bound.apply_defaults()
        static = _STATIC | _INTERVALS if bound.arguments.get("stagger") is True else _STATIC
        for name, value in bound.arguments.items():
            if name in static and value is not None:
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
