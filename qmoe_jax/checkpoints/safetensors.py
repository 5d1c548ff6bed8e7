# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: a JSON header of names, dtypes, shapes and places, then the raw arrays.

Format: https://github.com/huggingface/safetensors#format. Nothing but the header is read until a
tensor is asked for, and every place that the header names is checked against the file.

The library of that name maps files into memory, so that one which becomes shorter would end the
process, and takes a whole file's tensors at once to write: hence this module.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from qmoe_jax.checkpoints.errors import CheckpointError

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_ALIGNMENT = 8  # of the first array


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor stands; nothing of it has been read."""

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file by name, each checked to lie within it.

    Raises:
      CheckpointError: no such file, not in this format, truncated, or tensors that overlap or do
        not fill the file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise _damaged(path, f"it has {size} bytes, and its header would have {length}")
            content = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(content, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = {name: _tensor(path, name, value, start) for name, value in header.items()}
        _check_filled(tensors, start, size)
    except (ValueError, RecursionError) as error:  # also of JSON and UTF-8
        raise _damaged(path, str(error)) from error
    return tensors


def read_tensor(tensor: Tensor) -> Shaped[np.ndarray, "..."]:
    """A fresh array of one tensor.

    Raises:
      CheckpointError: the file cannot be read, or has become shorter.
    """
    nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    try:
        data = np.fromfile(tensor.path, np.uint8, nbytes, offset=tensor.offset)
    except OSError as error:
        raise CheckpointError(f"cannot read {tensor.path}: {error.strerror or error}") from error
    if data.size != nbytes:
        raise _damaged(tensor.path, f"{data.size} of {nbytes} bytes at {tensor.offset} are there")
    return data.view(tensor.dtype).reshape(tensor.shape)


def header_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    """The start of a file of tensors of one dtype, which follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return struct.pack("<Q", len(content)) + content


@contextlib.contextmanager
def create(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype
) -> Iterator[Callable[[str, Shaped[np.ndarray, "..."]], None]]:
    """Writes a file of tensors of one dtype, which are handed over one by one.

    Args:
      path: the file; it must not exist.
      shapes: of all tensors, in the order in which they will come.
      dtype: what they are cast to.

    Returns:
      In the block, a function of a tensor's name and values. The file is on disk at its end.
    """
    left = iter(shapes.items())
    with open(path, "xb") as file:
        file.write(header_bytes(shapes, dtype))

        def write(name: str, array: np.ndarray) -> None:
            expected = next(left, None)
            assert (name, array.shape) == expected, f"{name} {array.shape}, not {expected}"
            values = np.asarray(array, dtype, order="C")
            file.write(values.reshape(-1).view(np.uint8).data)

        yield write
        assert next(left, None) is None
        file.flush()
        os.fsync(file.fileno())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has one key twice")
    return found


def _tensor(path: pathlib.Path, name: str, value: Any, start: int) -> Tensor:
    known = isinstance(value, dict) and isinstance(value.get("dtype"), str)
    if not known or value["dtype"] not in DTYPES:
        raise ValueError(f"`{name[:200]}` has no dtype that is known here")
    shape, offsets = _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"`{name[:200]}` has no sound `shape` and `data_offsets`")
    dtype = DTYPES[value["dtype"]]
    # NumPy multiplies the other axes of an empty array too.
    possible = math.prod(max(n, 1) for n in shape) < 2**60
    if not possible or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"`{name[:200]}` of shape {shape} cannot lie at bytes {offsets}")
    return Tensor(path, dtype, shape, start + offsets[0])


def _sizes(value: Any) -> tuple[int, ...] | None:
    """The integers of a list, if all are such that NumPy can take for sizes."""
    if not isinstance(value, list) or len(value) > 8:
        return None
    if not all(type(n) is int and 0 <= n < 2**48 for n in value):
        return None
    return tuple(value)


def _check_filled(tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """The arrays follow one another without holes to the file's end: a copy cut short shows."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].shape)):
        if tensor.offset != end and math.prod(tensor.shape):
            raise ValueError(f"`{name[:200]}` starts at byte {tensor.offset}, not at {end}")
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
    if end != size:
        raise ValueError(f"it has {size} bytes where its header tells of {end}")


def _damaged(path: pathlib.Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no safetensors file or a damaged copy ({why}): copy or download it again."
    )
