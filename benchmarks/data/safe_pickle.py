"""Reads CIFAR's pickles without letting them run anything.

A pickle is a program that may call whatever it names. CIFAR's pickles name only a uint8 array and,
if Python 3 wrote them in an old protocol, an encoding of bytes. Every other name is refused, and
NumPy itself is not called either: a stand-in receives shape and content.
"""

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Dtype:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r}, expected uint8")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment: uint8 has none


class _Array:
    """Stands for an array that is filled after its construction."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, is_fortran, content = state
        order = "F" if is_fortran else "C"
        self.value = np.frombuffer(content, np.uint8).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for ``codecs.encode``: how Python 3 writes bytes in protocols below 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


_PERMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct, never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuses everything that is not on the list."""
        try:
            return _PERMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, refused") from None


def safe_loads(content: bytes) -> dict[Any, Any]:
    """Unpickles a dict of numbers, strings, lists and uint8 arrays.

    Args:
        content: the pickle.

    Returns:
        The dict. Strings of Python 2 come as bytes.

    Raises:
        pickle.UnpicklingError: the pickle asks for anything else. A damaged pickle can raise any
            error.
    """
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(batch, dict):
        raise pickle.UnpicklingError(f"it holds a {type(batch).__name__}, expected a dict")
    return {k: v.value if isinstance(v, _Array) else v for k, v in batch.items()}
