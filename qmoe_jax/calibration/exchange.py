# SPDX-License-Identifier: Apache-2.0
"""Rows of host arrays travel between processes: equal, padded all-to-all rounds of bounded size.

Nobody ever holds more than the rows that are its own, those that visit it, and one round.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped

PROCESS = "process"
ROUND_BYTES = 64 << 20  # that a process sends in one round, about


@dataclasses.dataclass(frozen=True)
class Trip:
    """Who sends which rows to whom."""

    mesh: Mesh  # one device of each process
    rows: Int[np.ndarray, " sent"]  # of this process, by destination, ascending for each
    counts: Int[np.ndarray, "procs procs"]  # from, to: rows

    @property
    def index(self) -> int:
        return jax.process_index()


def process_mesh() -> Mesh:
    """One device of each process, in their order."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.asarray([first[index] for index in sorted(first)]), (PROCESS,))


def plan(mesh: Mesh, destination: Int[np.ndarray, " N"]) -> Trip:
    """A trip for rows to the processes named; other numbers stay. All processes call this."""
    count = mesh.size
    going = np.flatnonzero(destination < count)
    rows = going[np.argsort(destination[going], kind="stable")]
    own = np.bincount(destination[going], minlength=count).astype(np.int32)
    counts = np.asarray(multihost_utils.process_allgather(own)).reshape(count, count)
    return Trip(mesh, rows, counts.astype(np.int64))


def send(trip: Trip, values: Shaped[np.ndarray, " N *rest"]) -> Shaped[np.ndarray, " M *rest"]:
    """The rows that come here, by process of origin. All processes call this."""
    return _travel(trip.mesh, values[trip.rows], trip.counts, trip.index)


def send_back(
    trip: Trip, values: Shaped[np.ndarray, " M *rest"], into: Shaped[np.ndarray, " N *rest"]
) -> None:
    """What became of the rows that `send` brought, into their places at home. All call this."""
    into[trip.rows] = _travel(trip.mesh, values, trip.counts.T, trip.index)


def _travel(
    mesh: Mesh, values: np.ndarray, counts: Int[np.ndarray, "procs procs"], index: int
) -> np.ndarray:
    """`values` by destination; gives what comes by origin. Bytes, whatever they mean."""
    rest, dtype = values.shape[1:], values.dtype
    width = int(np.prod(rest, dtype=np.int64)) * dtype.itemsize
    data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), width)
    out = np.empty((int(counts[:, index].sum()), width), np.uint8)
    from_here, to_here = _starts(counts[index]), _starts(counts[:, index])
    for start, size in _rounds(counts, width):
        sent = np.zeros((mesh.size, size, width), np.uint8)
        for other in range(mesh.size):
            part = data[from_here[other] : from_here[other + 1]][start : start + size]
            sent[other, : len(part)] = part
        came = _all_to_all(mesh, sent)
        for other in range(mesh.size):
            place = out[to_here[other] : to_here[other + 1]][start : start + size]
            place[...] = came[other, : len(place)]
    return out.view(dtype).reshape(len(out), *rest)


def _rounds(counts: np.ndarray, width: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each round, the same on all processes."""
    most = int(counts.max())
    fitting = max(1, ROUND_BYTES // max(1, len(counts) * width))
    size = min(fitting, 1 << max(most - 1, 0).bit_length())  # few shapes are compiled
    for start in range(0, most, size):
        yield start, size


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _all_to_all(mesh: Mesh, sent: np.ndarray) -> np.ndarray:
    sharding = NamedSharding(mesh, PartitionSpec(PROCESS))
    whole = jax.make_array_from_process_local_data(sharding, sent[None])
    return np.asarray(_swap(mesh)(whole).addressable_data(0))[0]


@functools.cache
def _swap(mesh: Mesh):
    def on_each(x):
        return jax.lax.all_to_all(x[0], PROCESS, 0, 0)[None]

    mapped = jax.shard_map(
        on_each, mesh=mesh, in_specs=PartitionSpec(PROCESS), out_specs=PartitionSpec(PROCESS)
    )
    return jax.jit(mapped)
