"""TODO: _optimizer/signatures"""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")


R = TypeVar("R")


def same_arguments_as(
    template: Callable[P, R],
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a function that takes ``**options`` the signature of `template`.

    So that help() and type checkers show every argument, and optax.inject_hyperparams, which
    reads the signature, finds those that it may inject.
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        function.__signature__ = inspect.signature(template)  # type: ignore[attr-defined]
        return function

    return decorate


def also_arguments_of(template: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Spells out ``**options`` in a function's signature: they are `template`'s keywords."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function).parameters.values()
        more = inspect.signature(template).parameters.values()
        parameters = [p for p in own if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in parameters}
        parameters += [p for p in more if p.kind is p.KEYWORD_ONLY and p.name not in known]
        signature = inspect.Signature(parameters)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate
