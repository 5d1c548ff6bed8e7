# SPDX-License-Identifier: Apache-2.0
"""Files of raw arrays, written whole or not at all, read with their checksums.

An array file is its arrays one after another, each starting at a multiple of 64 bytes, little
endian, C order. What they are stands in the `FileEntry` that writing returns and reading takes; the
store keeps those in its journal and manifest.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import secrets
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from qmoe_jax.checkpoints import remote
from qmoe_jax.checkpoints.errors import CheckpointError

ALIGNMENT = 64
DTYPES = {
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_APPENDING = threading.Lock()
_MAX_AXES = 4
_MAX_NAME = 255  # characters
# Names that mean the same on every file system and stay below the folder.
_NAME = re.compile(r"(\w[\w.-]*/)*\w[\w.-]*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """Where one array stands in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    crc32: int

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One array file and what is in it."""

    name: str  # relative to the store, with slashes
    nbytes: int
    arrays: dict[str, ArrayEntry]


def write_arrays(
    folder: pathlib.Path, name: str, arrays: Mapping[str, Shaped[np.ndarray, "..."]]
) -> FileEntry:
    """Writes `folder/name`; it appears complete and on disk, or not at all.

    Raises:
      CheckpointError: the disk is full or cannot be written.
      ValueError: a name or a dtype that a store does not hold.
    """
    _check_name(name)
    entries = {}
    with replacing(folder / name) as handle:
        for key, array in arrays.items():
            dtype = array.dtype.name
            if dtype not in DTYPES:
                raise ValueError(f"`{key}` has dtype {dtype}; expected one of {', '.join(DTYPES)}")
            handle.write(b"\0" * (-handle.tell() % ALIGNMENT))
            data = _data(array)
            entries[key] = ArrayEntry(dtype, array.shape, handle.tell(), zlib.crc32(data))
            handle.write(data)
        nbytes = handle.tell()
    return FileEntry(name, nbytes, entries)


def checksum(array: Shaped[np.ndarray, "..."]) -> int:
    """The CRC-32 that `write_arrays` gives an array."""
    return zlib.crc32(_data(array))


def read_array(folder: pathlib.Path, file: FileEntry, key: str) -> Shaped[np.ndarray, "..."]:
    """One array of a file, its checksum verified; a fresh array.

    Raises:
      CheckpointError: the file is missing, short or damaged.
    """
    path, entry = folder / file.name, file.arrays[key]
    try:
        with open(path, "rb") as handle:
            handle.seek(entry.offset)
            data = np.fromfile(handle, np.uint8, entry.nbytes)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({_reason(error)}): restore the file from a copy or compress "
            "again."
        ) from error
    crc32 = zlib.crc32(data.data)
    if data.size != entry.nbytes or crc32 != entry.crc32:
        raise CheckpointError(
            f"{path}: array `{key}` is damaged (expected {entry.nbytes} bytes with checksum "
            f"{entry.crc32:08x}, found {data.size} with {crc32:08x}): restore the file "
            "from a copy or compress again."
        )
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _data(array: np.ndarray) -> memoryview:
    stored = np.asarray(array, DTYPES[array.dtype.name], order="C")
    return stored.reshape(-1).view(np.uint8).data


def to_json(file: FileEntry) -> dict[str, Any]:
    """The entry as JSON values."""
    return dataclasses.asdict(file)


def from_json(value: Any) -> FileEntry:
    """The inverse of `to_json`; every field is checked, since a manifest is a file like any other.

    Raises:
      ValueError: naming the field.
    """
    name, nbytes = field(value, "name", str), size(value, "nbytes")
    _check_name(name)
    arrays = {}
    for key, item in field(value, "arrays", dict).items():
        entry = arrays[key] = _array_from_json(key, item)
        if entry.offset + entry.nbytes > nbytes:
            raise ValueError(f"array {key!r} ends past the {nbytes} bytes of {name!r}")
    return FileEntry(name, nbytes, arrays)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a small text file; the old one stays until the new one is on disk.

    Raises:
      CheckpointError: see `write_arrays`.
    """
    with replacing(path) as handle:
        handle.write(text.encode())


def append_line(path: pathlib.Path, line: str) -> None:
    """Adds a line to a file and waits until it is on disk; a part of a line is taken back.

    Threads may do so side by side.

    Raises:
      CheckpointError: see `write_arrays`.
    """
    try:
        with _APPENDING, open(path, "r+b", buffering=0) as handle:
            end = handle.seek(0, os.SEEK_END)
            try:
                left = memoryview(line.encode() + b"\n")
                while left:
                    left = left[handle.write(left) :]
                os.fsync(handle.fileno())
            except BaseException:
                handle.truncate(end)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def drop_cut_line(path: pathlib.Path) -> None:
    """Takes back a last line that a crash has cut off.

    Raises:
      OSError: the file cannot be read or written.
    """
    with open(path, "r+b") as handle:
        whole = handle.read().rfind(b"\n") + 1
        if handle.tell() != whole:
            handle.truncate(whole)
            os.fsync(handle.fileno())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Writes beside `path` and renames over it when all is on disk.

    Raises:
      CheckpointError: see `write_arrays`.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        _make_folder(path.parent)
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Makes a folder whose files are written in the block; it appears when that ends well.

    Returns:
      In the block, the folder under a temporary name beside its own; nothing remains of it if the
      block raises.

    Raises:
      CheckpointError: see `check_new`; it cannot be written.
    """
    check_new(folder)
    target = pathlib.Path(folder).absolute()
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_new(folder)
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {_reason(error)}. Free space on that disk, or choose another "
            "folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def local_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a folder that is to be written.

    Raises:
      CheckpointError: it is a URL, no name at all, or a file.
    """
    if not os.fspath(path) or pathlib.Path(path).is_file():
        raise CheckpointError(f"{os.fspath(path)!r} is no folder: choose a folder, new or not.")
    if remote.is_url(path):
        raise CheckpointError(
            f"cannot write to {os.fspath(path)}: what is finished is renamed, which object stores "
            "cannot do at once. Write to a local folder and copy it."
        )
    return pathlib.Path(path)


def check_new(folder: str | os.PathLike[str]) -> None:
    """Checks that `folder` is a local path where nothing lies.

    Raises:
      CheckpointError: it exists already, or is a URL.
    """
    if os.path.lexists(local_folder(folder)):
        raise CheckpointError(f"{folder} exists already: choose one that does not exist.")


def field(value: Any, key: str, kind: type) -> Any:
    """`value[key]` of parsed JSON, which must be there and a `kind` (true is no int)."""
    if not isinstance(value, dict) or type(value.get(key)) is not kind:
        raise ValueError(f"`{key}` is missing or not of type {kind.__name__}")
    return value[key]


def size(value: Any, key: str) -> int:
    """`value[key]` of parsed JSON, which must be an integer from 0 to 2**63 - 1."""
    number = field(value, key, int)
    if not 0 <= number < 2**63:
        raise ValueError(f"`{key}` is {number}")
    return number


def _array_from_json(key: str, value: Any) -> ArrayEntry:
    dtype, shape = field(value, "dtype", str), tuple(field(value, "shape", list))
    if dtype not in DTYPES:
        raise ValueError(f"array {key!r} has the unknown dtype {dtype!r}")
    # NumPy multiplies the other axes of an empty array too.
    sound = len(shape) <= _MAX_AXES and all(type(n) is int and n >= 0 for n in shape)
    if not sound or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError(f"array {key!r} has the impossible shape {shape}")
    return ArrayEntry(dtype, shape, size(value, "offset"), size(value, "crc32"))


def _check_name(name: str) -> None:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(
            f"file name {name!r} is not a path of at most {_MAX_NAME} ASCII letters, digits, "
            "'_', '.', '-' and '/' below the checkpoint"
        )


def _make_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: pathlib.Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({_reason(error)}): free space on that disk (or "
        "let it be written), or choose another OUTPUT_DIR. What was committed before is intact."
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
