"""Tracing a function as if JAX had never seen any part of it.

`nn.jit`, `jax.jit` and `jax.checkpoint` keep what they traced, and a cached trace would run no
interceptor. A label that is part of the caches' keys keeps them away; it is taken off again, so
that the program is the one that would have been compiled anyway.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

_numbers = itertools.count()


def make_fresh_jaxpr(function: Callable[..., Any], *args: Any) -> core.ClosedJaxpr:
    """`jax.make_jaxpr` that finds nothing in JAX's caches and leaves nothing usable there."""
    with set_xla_metadata(tekfac_trace=str(next(_numbers))):
        jaxpr = jax.make_jaxpr(function)(*args)
        labelled = _context()
    return _Relabel(labelled, _context()).closed(jaxpr)


def _context() -> Any:
    """The context that JAX notes with each equation it traces now."""
    (eqn,) = jax.make_jaxpr(lambda x: x + 1)(0.0).eqns
    return eqn.ctx


class _Relabel:
    """Puts equations of one context into another, and those of the functions that they call."""

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new
        # A function that is called often stays one function.
        self.done: dict[int, tuple[Any, Any]] = {}

    def closed(self, jaxpr: Any) -> Any:
        if id(jaxpr) not in self.done:
            new = core.ClosedJaxpr(self.open(jaxpr.jaxpr), jaxpr.consts)
            self.done[id(jaxpr)] = jaxpr, new  # the old one is kept, and with it its id
        return self.done[id(jaxpr)][1]

    def open(self, jaxpr: Any) -> Any:
        return jaxpr.replace(eqns=[self.equation(eqn) for eqn in jaxpr.eqns])

    def equation(self, eqn: Any) -> Any:
        params = dict(eqn.params)
        for key in ("jaxpr", "call"):
            if hasattr(params.get(key), "consts"):
                params[key] = self.closed(params[key])
            elif hasattr(params.get(key), "eqns"):
                params[key] = self.open(params[key])
        context = self.new if eqn.ctx == self.old else eqn.ctx
        return eqn.replace(params=params, ctx=context)
