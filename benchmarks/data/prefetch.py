"""The next batches on their way to the device while a step runs."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from benchmarks.errors import UsageError

_END = object()


def prefetch(batches: Iterable[Any], size: int = 2) -> Generator[Any, None, None]:
    """The same batches in the same order, on the device, made ahead by a thread.

    What `batches` raises is raised here, when its turn comes. Where the consumer stops early the
    thread ends after the batch that it is at, and no more are taken; close the iterator
    (`contextlib.closing`) to have that at once rather than when it is collected.

    Args:
        batches: pytrees of numpy arrays, which nobody changes afterwards: on CPU the device may
            read them where they are. It runs in the thread, where settings such as
            `jax.enable_x64`, made by a context, do not hold.
        size: how many are made ahead, 1 or more: so many lie on the device beside the one in use.

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

    # One worker: so the batches come in their order.
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(load) for _ in range(size))
        while (batch := ahead.popleft().result()) is not _END:
            ahead.append(pool.submit(load))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
