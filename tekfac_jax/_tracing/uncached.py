"""Tracing a function as if JAX had never seen any part of it.

`nn.jit`, `jax.jit` and `jax.checkpoint` cache what they traced, and a cached trace would run no
interceptor. The trace therefore runs under a fresh label that is part of the keys of these caches.
The label is removed afterwards, so that the program is the one that would be compiled without it.
"""

import itertools
from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from tekfac_jax._layers.types import PyTree
from tekfac_jax._tracing.markers import is_closed, is_open

_numbers = itertools.count()


def make_fresh_jaxpr(function: Callable[..., PyTree], *args: PyTree) -> core.ClosedJaxpr:
    """`jax.make_jaxpr` that finds nothing in JAX's caches and leaves nothing usable there."""
    with set_xla_metadata(tekfac_trace=str(next(_numbers))):
        jaxpr = jax.make_jaxpr(function)(*args)
        labelled = _new_equation()
    return _Relabel(labelled, _new_equation()).closed(jaxpr)


def _new_equation() -> core.JaxprEqn:
    """An equation with the context that JAX records with whatever it traces now."""
    (eqn,) = jax.make_jaxpr(lambda x: x + 1)(0.0).eqns
    return eqn


class _Relabel:
    """Moves equations from one context to another, including those of the functions they call."""

    def __init__(self, old: core.JaxprEqn, new: core.JaxprEqn) -> None:
        self.old, self.new = old.ctx, new.ctx
        # id of a jaxpr -> itself and its copy: a function that is called often stays one function.
        self.done: dict[int, tuple[core.ClosedJaxpr, core.ClosedJaxpr]] = {}

    def closed(self, jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
        if id(jaxpr) not in self.done:
            new = core.ClosedJaxpr(self.open(jaxpr.jaxpr), jaxpr.consts)
            self.done[id(jaxpr)] = jaxpr, new  # holding the old jaxpr keeps its id unique
        return self.done[id(jaxpr)][1]

    def open(self, jaxpr: core.Jaxpr) -> core.Jaxpr:
        return jaxpr.replace(eqns=[self.equation(eqn) for eqn in jaxpr.eqns])

    def equation(self, eqn: core.JaxprEqn) -> core.JaxprEqn:
        params = dict(eqn.params)
        for key in ("jaxpr", "call"):
            value = params.get(key)
            if is_closed(value):
                params[key] = self.closed(value)
            elif is_open(value):
                params[key] = self.open(value)
        context = self.new if eqn.ctx == self.old else eqn.ctx
        return eqn.replace(params=params, ctx=context)
