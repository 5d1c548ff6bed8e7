# SPDX-License-Identifier: Apache-2.0
"""Activations on disk, as a stopped run finds them again: raw bytes, and checksums of their pieces.

A buffer in memory is copied to a file; of a memory-mapped one its own file is the snapshot, which
holds until that buffer is written to again.
"""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Shaped, UInt8

from qmoe_jax.checkpoints import array_files
from qmoe_jax.checkpoints.errors import CheckpointError

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
