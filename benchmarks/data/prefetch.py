"""Copies the next batches to the device while a step runs."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from benchmarks.errors import UsageError

_END = object()


def prefetch(batches: Iterable[Any], size: int = 2) -> Generator[Any, None, None]:
    """Yields the same batches in the same order, on the device, made ahead by a thread.

    An exception of `batches` is raised here in its turn. If the consumer stops early, the thread
    finishes its current batch and takes no more. Close the iterator (`contextlib.closing`) so that
    this happens at once, not at garbage collection.

    Args:
        batches: pytrees of numpy arrays that must not change afterwards: on CPU the device may read
            them in place. The iterable runs in the thread, where settings made by a context, such
            as `jax.enable_x64`, do not apply.
        size: number of batches made ahead, 1 or more; as many lie on the device beside the one in
            use.

    Returns:
        Iterator of pytrees of `jax.Array`.

    Raises:
        UsageError: `size` below 1.
    """
    if size < 1:
        raise UsageError(f"size must be 1 or more batches made ahead, got {size}")
    return _prefetch(iter(batches), size)


def _prefetch(batches: Iterator[Any], size: int) -> Generator[Any, None, None]:
    def load() -> Any:
        batch = next(batches, _END)
        return batch if batch is _END else jax.device_put(batch)

    # One worker keeps the batches in order.
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(load) for _ in range(size))
        while (batch := ahead.popleft().result()) is not _END:
            ahead.append(pool.submit(load))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
