# SPDX-License-Identifier: Apache-2.0
"""One thread for each device: the same function, each on its share of the work.

Devices need no lockstep: samples and experts are independent of each other, and what one device
computes is what any other would.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Worker:
    """One device and its place among all."""

    device: Any
    place: int
    count: int
    stopped: threading.Event  # another one failed: end after the piece at hand

    def share(self, items: Sequence[T]) -> "Share[T]":
        """Every `count`-th item."""
        return Share(items[self.place :: self.count], self.stopped)


class Share(list[T]):
    """A worker's items; a loop over them ends early where another worker has failed."""

    def __init__(self, items: Iterable[T], stopped: threading.Event):
        super().__init__(items)
        self._stopped = stopped

    def __iter__(self) -> Iterator[T]:
        for item in super().__iter__():
            if self._stopped.is_set():
                return
            yield item


def on_each(devices: Sequence[Any], function: Callable[[Worker], T]) -> list[T]:
    """Runs `function` for each device, with that as JAX's default device; results in their order.

    An exception is raised when all have ended. One device alone needs no thread.
    """
    stopped = threading.Event()
    workers = [Worker(device, i, len(devices), stopped) for i, device in enumerate(devices)]
    if len(workers) == 1:
        return [function(workers[0])]

    def run(worker: Worker) -> T:
        threading.current_thread().name = f"device {worker.place}"
        with on_device(worker):
            return function(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(run, worker) for worker in workers]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also where the main thread is interrupted
            if not all(future.done() and future.exception() is None for future in futures):
                stopped.set()
    return [future.result() for future in futures]


@contextlib.contextmanager
def on_device(worker: Worker):
    """In a thread that a worker began: its device, if there are several, is the default one."""
    if worker.count == 1:
        yield
        return
    with jax.default_device(worker.device):
        yield
