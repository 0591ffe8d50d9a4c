"""What the layers tell while a function is traced: a note of each call, and markers around it."""

import contextlib
import contextvars
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from tekfac_jax._layers.spec import LayerSpec
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
        norms: whether normalisations are layers too.
    """

    def __init__(self, norms: bool) -> None:
        self.norms = norms
        self.calls: dict[int, Call] = {}  # by number
        self.others: dict[int, str] = {}  # number of another module's call -> why it is no layer
        self.differentiated: set[int] = set()  # calls that the traced function differentiates
        self._numbers = itertools.count()
        self._model: int | None = None  # number of the outermost module call, while there is one

    @contextlib.contextmanager
    def module(self, tree: Any) -> Iterator[None]:
        """Around the call of any module; `tree` holds an array that it uses."""
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
        x: Any,
        parameters: Mapping[str, Any],
        kernel: Any,
        describe: Callable[[jax.Array], LayerSpec | str],
        captured: jax.ShapeDtypeStruct,
        name: str,
    ) -> jax.Array:
        """Makes the call of a supported layer inside a call of `module`; returns its output.

        Args:
            call: the call itself.
            x: its input.
            parameters: the layer's own.
            kernel: the one of them that is multiplied.
            describe: from the output to the spec, or to the reason why there is none.
            captured: shape and dtype in which the input is captured.
            name: for messages.
        """
        number = next(self._numbers)
        self._mark(x, number, "begin")
        for key, value in parameters.items():
            if hasattr(value, "shape"):
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

    def other(self, parameters: Mapping[str, Any], why: str) -> None:
        """Notes the parameters of a module that is no supported layer, and why it is none."""
        number = next(self._numbers)
        self.others[number] = why
        for key, value in parameters.items():
            if hasattr(value, "shape"):
                self._mark(value, number, "other_" + _word(key))

    def _mark(self, value: Any, number: int, role: str) -> Any:
        return mark(value, number, role, lambda: self.differentiated.add(number))


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


def current_recorder() -> Recorder | None:
    """The recorder of the trace that is going on, if there is one."""
    return _recorder.get()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Makes it the current one."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
