# SPDX-License-Identifier: Apache-2.0
"""Work that goes on beside the device's: reading ahead and writing behind, one thread for each."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def read_ahead(items: Iterable[T], depth: int = 1) -> Iterator[Iterator[T]]:
    """Iterates in a thread, at most `depth` items ahead of the one that the consumer has.

    The source's exception is raised where the consumer meets it. Leaving the context waits for the
    item being read, if any, and closes the source, also when the consumer stops early.

    Raises:
      ValueError: `depth` is not positive.
    """
    _check_depth(depth)
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        reading = collections.deque(pool.submit(next, iterator, end) for _ in range(depth))

        def consume() -> Iterator[T]:
            while (item := reading.popleft().result()) is not end:
                reading.append(pool.submit(next, iterator, end))
                yield item  # pyright: ignore[reportReturnType]
                del item  # or it lives on while the next one is waited for

        try:
            yield consume()
        finally:
            _cancel(reading)
            # In its own thread, where a running `next` has returned.
            pool.submit(getattr(iterator, "close", lambda: None)).result()


def shared(items: Iterable[T]) -> Callable[[], Iterator[T]]:
    """One source for several threads: each iterates, and an item goes to whoever asks next.

    The source's exception is raised to the one that met it; for the others it ends.
    """
    iterator, end, lock = iter(items), object(), threading.Lock()

    def each() -> Iterator[T]:
        while True:
            with lock:
                item = next(iterator, end)
            if item is end:
                return
            yield item  # pyright: ignore[reportReturnType]
            del item  # or it lives on while the next one is waited for

    return each


@contextlib.contextmanager
def write_behind(depth: int = 2) -> Iterator[Callable[..., Future]]:
    """Runs submitted calls in order in one thread, at most `depth` of them outstanding.

    Submitting returns the call's future. A call's exception is raised by a later submit, or on
    leaving the context, which waits for all.
    When the context is left by an exception, calls that have not begun are dropped.

    Raises:
      ValueError: `depth` is not positive.
    """
    _check_depth(depth)
    pending: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(1, "write-behind") as pool:

        def submit(function: Callable, *args) -> Future:
            while pending and (len(pending) >= depth or pending[0].done()):
                pending.popleft().result()
            pending.append(pool.submit(function, *args))
            return pending[-1]

        try:
            yield submit
            while pending:
                pending.popleft().result()
        except BaseException:
            _cancel(pending)
            raise


def _check_depth(depth: int) -> None:
    if depth < 1:
        raise ValueError(f"`depth` is {depth}; expected 1 or more")


def _cancel(futures: Iterable[Future]) -> None:
    for future in futures:
        future.cancel()
