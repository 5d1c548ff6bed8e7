# SPDX-License-Identifier: Apache-2.0
"""Activations on disk, as a stopped run finds them again: raw bytes, and checksums of their pieces.

A buffer in memory is copied to a file; of a memory-mapped one its own file is the snapshot, which
holds until that buffer is written to again.
"""

import dataclasses
import math
import os
import pathlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Shaped, UInt8

from qmoe_jax.calibration import walk
from qmoe_jax.calibration.walk import Activations
from qmoe_jax.checkpoints import array_files
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import processes as processes_lib
from qmoe_jax.runs.processes import Processes

PIECE = 64 << 20  # bytes under one checksum


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One buffer's content."""

    file: str  # absolute
    nbytes: int
    crc32: list[int]  # of each piece of `PIECE` bytes

    @property
    def path(self) -> pathlib.Path:
        return pathlib.Path(self.file)


def take(data: Shaped[np.ndarray, "tokens D"], file: pathlib.Path) -> Snapshot:
    """Makes sure that a buffer is on disk: in `file`, or in its own if it is memory-mapped.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    if isinstance(data, np.memmap):
        data.flush()
        file = pathlib.Path(str(data.filename))
    else:
        with array_files.replacing(file) as handle:
            handle.write(_bytes(data).data)
    return Snapshot(str(file.absolute()), data.nbytes, _checksums(data))


def check_size(snapshot: Snapshot) -> None:
    """Checks that a snapshot's file is there, whole.

    Raises:
      CheckpointError: it is missing or of another size.
    """
    try:
        size = snapshot.path.stat().st_size
    except OSError as error:
        raise CheckpointError(_damaged(snapshot, f"cannot be read: {error.strerror}")) from error
    if size != snapshot.nbytes:
        raise CheckpointError(_damaged(snapshot, f"has {size:,}"))


def load(snapshot: Snapshot, out: Shaped[np.ndarray, "tokens D"]) -> None:
    """Fills `out` with what was taken, or only checks it where `out` is mapped to that very file.

    Raises:
      CheckpointError: the file is missing, of another size or damaged.
    """
    check_size(snapshot)
    mapped = isinstance(out, np.memmap) and snapshot.path.samefile(str(out.filename))
    if not mapped:
        _bytes(out)[...] = np.memmap(snapshot.path, np.uint8, "r")
    if _checksums(out) != snapshot.crc32:
        raise CheckpointError(_damaged(snapshot, "has other bytes than were written"))


def take_shared(processes: Processes, state: Activations, file: pathlib.Path) -> Snapshot:
    """`take` for what several processes have parts of: each writes its rows into one file.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    dtype, width = state.current.data.dtype, state.current.data.shape[1]
    shape = (walk.num_tokens(state), width)
    nbytes = math.prod(shape) * dtype.itemsize
    with processes_lib.together(processes, f"writing {file}"):
        if processes.first:
            with array_files.replacing(file) as handle:
                os.posix_fallocate(handle.fileno(), 0, max(1, nbytes))
    with processes_lib.together(processes, f"writing {file}"):
        shared = np.memmap(file, dtype, "r+", shape=shape)
        shared[walk.global_rows(state)] = state.current.data
        shared.flush()
        del shared
    checksums = _own_checksums(processes, file)
    whole = {
        piece: crc32 for part in processes_lib.gather(processes, checksums) for piece, crc32 in part
    }
    return Snapshot(str(file.absolute()), nbytes, [whole[piece] for piece in sorted(whole)])


def load_shared(processes: Processes, snapshot: Snapshot, state: Activations) -> None:
    """Fills `state.current` with this process's rows of a snapshot, whoever took it.

    Raises:
      CheckpointError: the file is missing, of another size or damaged; on all processes.
    """
    with processes_lib.together(processes, f"reading {snapshot.file}"):
        check_size(snapshot)
        for piece, crc32 in _own_checksums(processes, snapshot.path):
            if crc32 != snapshot.crc32[piece]:
                raise CheckpointError(_damaged(snapshot, "has other bytes than were written"))
        shape = (walk.num_tokens(state), state.current.data.shape[1])
        shared = np.memmap(snapshot.path, state.current.data.dtype, "r", shape=shape)
        state.current.data[...] = shared[walk.global_rows(state)]


def _own_checksums(processes: Processes, file: pathlib.Path) -> list[tuple[int, int]]:
    """Of this process's share of the pieces, with their numbers."""
    whole = np.memmap(file, np.uint8, "r")
    pieces = range(processes.index, -(-whole.size // PIECE), processes.count)
    return [(n, zlib.crc32(whole[n * PIECE : (n + 1) * PIECE].data)) for n in pieces]


def _damaged(snapshot: Snapshot, found: str) -> str:
    return f"{snapshot.file}, {snapshot.nbytes:,} bytes of activations, {found}"


def _bytes(data: np.ndarray) -> UInt8[np.ndarray, " bytes"]:
    return np.asarray(data).reshape(-1).view(np.uint8)


def _checksums(data: np.ndarray) -> list[int]:
    def pieces() -> Iterator[memoryview]:
        whole = _bytes(data)
        for start in range(0, whole.size, PIECE):
            yield whole[start : start + PIECE].data

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(zlib.crc32, pieces()))
