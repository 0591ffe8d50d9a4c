"""The recorder of a trace: it notes each layer call and places markers around it."""

import contextlib
import contextvars
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeGuard

import jax

from tekfac_jax._layers.spec import LayerSpec
from tekfac_jax._layers.types import PyTree
from tekfac_jax._tracing.markers import mark


class Call(NamedTuple):
    """One call of a layer of a supported type, as Python saw it."""

    described: LayerSpec | str  # the spec, still without a path, or why there is none
    input: jax.ShapeDtypeStruct  # in the dtype in which it is captured
    output: jax.ShapeDtypeStruct
    model: int  # number of the outermost module call around it
    name: str  # type and module path, for messages


class Recorder:
    """Notes the layer calls of one trace. Changes nothing and computes nothing.

    Attributes:
        norms: whether normalisations count as layers.
    """

    def __init__(self, norms: bool) -> None:
        self.norms = norms
        self.calls: dict[int, Call] = {}  # by number
        self.others: dict[int, str] = {}  # number of another module's call -> why it is no layer
        self.differentiated: set[int] = set()  # calls that the traced function differentiates
        self._numbers = itertools.count()
        self._model: int | None = None  # number of the outermost module call, while there is one

    @contextlib.contextmanager
    def module(self, tree: PyTree) -> Iterator[None]:
        """Surrounds the call of any module; `tree` holds an array that the call uses."""
        if self._model is not None:
            yield
            return
        self._model = next(self._numbers)
        try:
            for leaf in jax.tree.leaves(tree):
                if isinstance(leaf, jax.Array):
                    self._mark(leaf, self._model, "model")
                    break
            yield
        finally:
            self._model = None

    def layer(
        self,
        call: Callable[[], jax.Array],
        x: jax.Array,
        parameters: Mapping[str, jax.Array],
        kernel: jax.Array,
        describe: Callable[[jax.Array], LayerSpec | str],
        captured: jax.ShapeDtypeStruct,
        name: str,
    ) -> jax.Array:
        """Makes the call of a supported layer inside `module`; returns the layer's output.

        Args:
            call: the call itself.
            x: its input.
            parameters: the layer's own parameters.
            kernel: the parameter that the input is multiplied by.
            describe: from the output to the spec, or to the reason why there is none.
            captured: shape and dtype in which the input is captured.
            name: for messages.
        """
        number = next(self._numbers)
        self._mark(x, number, "begin")
        for key, value in parameters.items():
            if has_shape(value):
                self._mark(value, number, "kernel" if value is kernel else _word(key))
        y = self._mark(call(), number, "end")
        assert self._model is not None
        self.calls[number] = Call(
            describe(y),
            captured,
            jax.eval_shape(lambda y: y, y),
            self._model,
            name,
        )
        return y

    def other(self, parameters: Mapping[str, jax.Array], why: str) -> None:
        """Notes the parameters of a module that is no supported layer, and the reason."""
        number = next(self._numbers)
        self.others[number] = why
        for key, value in parameters.items():
            if has_shape(value):
                self._mark(value, number, "other_" + _word(key))

    def _mark(self, value: jax.Array, number: int, role: str) -> jax.Array:
        return mark(value, number, role, lambda: self.differentiated.add(number))


def has_shape(value: object) -> TypeGuard[jax.Array]:
    """Whether a value is an array, and not one of the other things that modules hold or take."""
    return hasattr(value, "shape")


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


def current_recorder() -> Recorder | None:
    """The recorder of the trace in progress, or None."""
    return _recorder.get()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Makes `recorder` the current one inside the block."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
