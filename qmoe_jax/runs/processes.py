# SPDX-License-Identifier: Apache-2.0
"""Several processes at work on one run (`jax.distributed`), and what they tell each other.

Small things only: records, counts, errors. Activations travel in rounds: `calibration/exchange.py`.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from qmoe_jax.checkpoints.errors import CheckpointError

_TOLD = "told_to_all_processes"


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all."""

    index: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this one writes what there is one of."""
        return self.index == 0

    def own(self, items: int) -> range:
        """This process's part of so many items that stand in a row."""
        return range(items * self.index // self.count, items * (self.index + 1) // self.count)

    def bounds(self, items: int) -> list[int]:
        """Where the parts of all processes end."""
        return [items * (index + 1) // self.count for index in range(self.count)]


def here() -> Processes:
    """As `jax.distributed.initialize` has it; one process alone where it was not called."""
    return Processes(jax.process_index(), jax.process_count())


def gather(processes: Processes, value: Any) -> list[Any]:
    """A small JSON value of every process, in their order, on all of them."""
    if processes.alone:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)
    ]


def total(
    processes: Processes, values: Shaped[np.ndarray, "*shape"]
) -> Shaped[np.ndarray, "*shape"]:
    """The sum over all processes, in their order and the dtype of `values`."""
    if processes.alone:
        return values
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)  # JAX would cut off 64 bits
    rows = np.asarray(multihost_utils.process_allgather(data))
    return np.sum([row.view(values.dtype) for row in rows], axis=0).reshape(values.shape)


@contextlib.contextmanager
def together(processes: Processes, what: str) -> Iterator[None]:
    """A step that fails on all processes if it fails on one.

    Steps may have steps inside: what failed is told once, in the innermost that it leaves, and all
    processes leave the outer ones with it.

    Raises:
      CheckpointError: on the others, with what the one said.
    """
    if processes.alone:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, _TOLD, False):
            gather(processes, str(error))
            setattr(error, _TOLD, True)
        raise
    failed = [(i, said) for i, said in enumerate(gather(processes, None)) if said is not None]
    if failed:
        index, said = failed[0]
        error = CheckpointError(f"{what} failed on process {index}: {said}")
        setattr(error, _TOLD, True)
        raise error
