# SPDX-License-Identifier: Apache-2.0
"""Activations of all samples, kept on the host while one block at a time is on the device.

A buffer is flat: the tokens of sample i are rows `offsets[i]` to `offsets[i + 1]`, without padding.
What is read is always copied: JAX may take a NumPy view without copying it, and a later write into
the buffer would change the JAX array.
"""

import dataclasses
import errno
import math
import os
import pathlib
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, Shaped

LENGTH_MULTIPLE = 64  # padded lengths are multiples of this, so that few shapes are compiled

_PIECE = 1 << 24  # bytes written at a time where a file system cannot be asked for space


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBuffer:
    """One vector per token of every sample, in memory or memory-mapped."""

    data: Shaped[np.ndarray, "tokens D"]
    offsets: Int[np.ndarray, " samples_plus_1"]  # int64

    @property
    def lengths(self) -> Int[np.ndarray, " samples"]:
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Samples that go through the dense part together, each side padded to one length."""

    samples: Int[np.ndarray, " B"]  # -1: an empty place
    padded: tuple[int, ...]  # one length for each side (encoder; or decoder and encoder)


def create(
    offsets: Int[np.ndarray, " samples_plus_1"],
    width: int,
    dtype: np.dtype,
    file: pathlib.Path | None = None,
) -> TokenBuffer:
    """A buffer of zeros; `file` makes it a memory map of that new file.

    Raises:
      OSError: where the file exists or cannot be made; disk space is taken at once, so that a full
        disk shows here and not as a bus error hours later.
    """
    shape = (int(offsets[-1]), width)
    if file is None:
        return TokenBuffer(np.zeros(shape, dtype), offsets)
    nbytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    try:
        _take_space(file, nbytes)
        return TokenBuffer(np.memmap(file, dtype, "r+", shape=shape), offsets)
    except OSError as error:
        remedy = "free space on that disk, or set BUFFER_DIR to a folder on another."
        if error.errno == errno.EEXIST:
            remedy = "remove it, or set BUFFER_DIR to another folder."
        message = f"{file} cannot take {nbytes:,} bytes of activations ({error.strerror}): {remedy}"
        raise OSError(error.errno, message) from error


def attach(
    offsets: Int[np.ndarray, " samples_plus_1"], width: int, dtype: np.dtype, file: pathlib.Path
) -> TokenBuffer:
    """The buffer that an earlier `create` mapped to `file`, with what was written into it.

    Raises:
      OSError: the file cannot be read and written.
      ValueError: it is too short.
    """
    return TokenBuffer(np.memmap(file, dtype, "r+", shape=(int(offsets[-1]), width)), offsets)


def read_batch(buffer: TokenBuffer, batch: Batch, side: int = 0) -> Shaped[np.ndarray, "B L D"]:
    """The batch's samples, padded with zeros; a fresh array."""
    width = buffer.data.shape[1]
    out = np.zeros((len(batch.samples), batch.padded[side], width), buffer.data.dtype)
    for place, sample in enumerate(batch.samples):
        if sample >= 0:
            start, stop = buffer.offsets[sample : sample + 2]
            out[place, : stop - start] = buffer.data[start:stop]
    return out


def write_batch(buffer: TokenBuffer, batch: Batch, values: Shaped[np.ndarray, "B L D"]) -> None:
    """The inverse of `read_batch`; padding is dropped."""
    for place, sample in enumerate(batch.samples):
        if sample >= 0:
            start, stop = buffer.offsets[sample : sample + 2]
            buffer.data[start:stop] = values[place, : stop - start]


def read_rows(
    data: Shaped[np.ndarray, " tokens *rest"], rows: Int[np.ndarray, " N"], size: int
) -> Shaped[np.ndarray, " size *rest"]:
    """Rows of a buffer (or of any array beside it), padded with zeros to `size`; a fresh array."""
    out = np.zeros((size, *data.shape[1:]), data.dtype)
    np.take(data, rows, axis=0, out=out[: len(rows)], mode="clip")
    return out


def length_batches(lengths: Int[np.ndarray, "samples sides"], batch_tokens: int) -> list[Batch]:
    """Groups samples of like padded lengths into batches of about `batch_tokens` positions.

    Every batch of one padded length has the same shape, the last one filled with empty places.
    """
    padded = -(-np.maximum(lengths, 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    batches = []
    for shape in np.unique(padded, axis=0):
        members = np.flatnonzero((padded == shape).all(1))
        size = min(len(members), max(1, batch_tokens // int(shape.max())))
        for start in range(0, len(members), size):
            samples = np.full(size, -1, np.int64)
            chosen = members[start : start + size]
            samples[: len(chosen)] = chosen
            batches.append(Batch(samples, tuple(int(length) for length in shape)))
    return batches


def _take_space(file: pathlib.Path, nbytes: int) -> None:
    """Makes a new file of zeros whose blocks are all allocated, or none at all."""
    with open(file, "xb") as handle:
        try:
            _allocate(handle, nbytes)
        except BaseException:
            file.unlink()
            raise


def _allocate(handle: BinaryIO, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle.fileno(), 0, nbytes)
        return
    for start in range(0, nbytes, _PIECE):
        handle.write(bytes(min(_PIECE, nbytes - start)))
    handle.flush()
