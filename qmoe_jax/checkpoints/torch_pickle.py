# SPDX-License-Identifier: Apache-2.0
"""Files of `torch.save` (a zip of one pickle and raw storages), read without torch or `pickle`.

The pickle is walked opcode by opcode. Of all that pickles can name, three things are known: dicts,
tensors and their storages; nothing is imported or called. Tensors become `TensorRef`s, whose
values are read one by one.
"""

import dataclasses
import math
import os
import pathlib
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from qmoe_jax.checkpoints.errors import CheckpointError

STORAGES = {
    "torch BoolStorage": np.dtype(np.bool_),
    "torch ByteStorage": np.dtype("u1"),
    "torch CharStorage": np.dtype("i1"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch IntStorage": np.dtype("<i4"),
    "torch LongStorage": np.dtype("<i8"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch FloatStorage": np.dtype("<f4"),
    "torch DoubleStorage": np.dtype("<f8"),
}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_MAX_PICKLE = 1 << 26  # bytes; a shard of the largest Switch model needs a few MiB
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and the extra field

# What zipfile raises on bytes that are no zip file, encrypted or of an unknown compression.
_DAMAGE = (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, KeyError, struct.error)

_NUMBERS = ["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"]
_STRINGS = ["BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES"]
_CONSTANTS = frozenset([*_NUMBERS, *_STRINGS])
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclasses.dataclass(frozen=True)
class Archive:
    """An opened file: its list of members is known, nothing else has been read."""

    path: pathlib.Path
    size: int
    pickle: zipfile.ZipInfo
    storages: dict[str, zipfile.ZipInfo]  # by the key that the pickle uses


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """One tensor: a strided view of a storage."""

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values
    offset: int  # of the first value, in values
    storage: str  # key in `Archive.storages`


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name of the pickle that is known here; never what it names."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Values of one dtype, as a pickle's persistent id describes them."""

    dtype: np.dtype
    key: str
    count: int


class _Mark:
    """Separates what an opcode collects from what lies below it on the stack."""


def open_archive(path: pathlib.Path) -> Archive:
    """Reads the list of members of a file that `torch.save` wrote.

    Raises:
      CheckpointError: no such file, not a torch zip file, damaged, or of a big-endian machine.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"it holds {len(pickles)} files `data.pkl`, not one")
            prefix = pickles[0].removesuffix("data.pkl")
            order = members.get(f"{prefix}byteorder")
            if order is not None and (
                order.compress_type != zipfile.ZIP_STORED or archive.read(order) != b"little"
            ):
                raise ValueError("its values are not little endian")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise _unusable(path, str(error)) from error
    folder = f"{prefix}data/"
    storages = {
        name.removeprefix(folder): info for name, info in members.items() if name.startswith(folder)
    }
    return Archive(path, size, members[pickles[0]], storages)


def read_object(archive: Archive) -> Any:
    """What was saved: nested dicts, lists, tuples and constants, with `TensorRef`s for tensors.

    Raises:
      CheckpointError: the pickle is damaged, or names something that state dicts do not need; a
        tensor does not lie within its storage, or a storage not within the file.
    """
    info = archive.pickle
    try:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > _MAX_PICKLE:
            raise ValueError(f"its pickle is compressed or has {info.file_size} bytes")
        with zipfile.ZipFile(archive.path) as file:
            content = file.read(info)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in names, which are refused next
            return _load(archive, content)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {archive.path}: {error.strerror or error}") from error
    except (*_DAMAGE, IndexError, TypeError) as error:
        raise _unusable(archive.path, str(error)) from error


def read_tensor(archive: Archive, ref: TensorRef) -> Shaped[np.ndarray, "..."]:
    """A fresh, contiguous array of one tensor; only its part of the storage is read.

    Raises:
      CheckpointError: the file cannot be read, or is damaged.
    """
    count = _extent(ref.shape, ref.strides)
    itemsize = ref.dtype.itemsize
    info = archive.storages[ref.storage]
    try:
        with open(archive.path, "rb") as file:
            file.seek(info.header_offset)
            # The name and extra field here may differ in length from those of the central list.
            signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + name + extra
            if signature != b"PK\3\4" or start + info.file_size > archive.size:
                raise ValueError(f"storage {ref.storage} does not lie within the file")
            file.seek(start + ref.offset * itemsize)
            data = np.fromfile(file, np.uint8, count * itemsize)
    except OSError as error:
        raise CheckpointError(f"cannot read {archive.path}: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise _unusable(archive.path, str(error)) from error
    if data.size != count * itemsize:
        raise _unusable(archive.path, f"storage {ref.storage} is cut short")
    strides = [stride * itemsize for stride in ref.strides]
    values = data.view(ref.dtype)
    return np.lib.stride_tricks.as_strided(values, ref.shape, strides).copy(order="C")


def _load(archive: Archive, content: bytes) -> Any:
    """Runs the pickle on a stack and a memo, as `pickle` does, with the opcodes of `torch.save`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "GLOBAL":
            stack.append(_known(archive, argument))
        elif name == "BINPERSID":
            stack.append(_storage(archive, stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(archive, function, arguments))
        elif name in _BUILDERS:
            _BUILDERS[name](stack)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the opcode {name}, which torch.save never writes")
    raise ValueError("its pickle has no end")


def _known(archive: Archive, name: str) -> _Global:
    if name in (_DICT, _TENSOR) or name in STORAGES:
        return _Global(name)
    raise CheckpointError(
        f"{archive.path} refers to `{name.replace(' ', '.')[:200]}`, which no state dict of "
        "tensors needs and which is not loaded, for pickles can run any code. Save the model's "
        "`state_dict()` alone, or as safetensors."
    )


def _storage(archive: Archive, value: Any) -> _Storage:
    kind, storage, key, _, count = value
    if kind != "storage" or not isinstance(storage, _Global) or storage.name not in STORAGES:
        raise ValueError("its pickle describes a storage that is none")
    if type(key) is not str or key not in archive.storages or type(count) is not int:
        raise ValueError("its pickle describes a storage that is not in the file")
    dtype, info = STORAGES[storage.name], archive.storages[key]
    if info.compress_type != zipfile.ZIP_STORED or count * dtype.itemsize > info.file_size:
        raise ValueError(f"storage {key} is compressed, or shorter than its {count} values")
    if info.header_offset + info.file_size > archive.size:
        raise ValueError(f"storage {key} does not lie within the file")
    return _Storage(dtype, key, count)


def _reduce(archive: Archive, function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError("its pickle calls what is no function")
    if function.name == _DICT and not arguments:
        return {}
    if function.name != _TENSOR or len(arguments) < 4:
        raise ValueError(f"its pickle calls {function.name} as torch.save never does")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage) or not all(map(_sizes, (shape, strides, (offset,)))):
        raise ValueError("its pickle describes a tensor that is none")
    end = offset + _extent(shape, strides)
    # An expanded tensor (a stride of 0) could ask for any amount of memory.
    if len(strides) != len(shape) or max(end, math.prod(shape)) > storage.count:
        raise ValueError(f"a tensor of shape {shape} exceeds its storage {storage.key}")
    return TensorRef(storage.dtype, shape, strides, offset, storage.key)


def _sizes(value: Any) -> bool:
    """Whether it is a short tuple of integers that NumPy can take for sizes."""
    sound = isinstance(value, tuple) and len(value) <= 8
    # NumPy multiplies the other axes of an empty array too.
    return (
        sound
        and all(type(n) is int and 0 <= n < 2**48 for n in value)
        and (math.prod(max(n, 1) for n in value) < 2**60)
    )


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Values from a tensor's first to its last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=False))


def _since_mark(stack: list[Any]) -> list[Any]:
    """Takes off what lies above the last mark, and the mark."""
    items = []
    while (item := stack.pop()) is not _Mark:
        items.append(item)
    return items[::-1]


def _set_items(stack: list[Any], items: list[Any]) -> None:
    target, keys = stack[-1], items[::2]
    # Tuples would hash for ever if nested deep enough.
    if type(target) is not dict or len(items) % 2 or not all(type(k) in (str, int) for k in keys):
        raise ValueError("its pickle fills what is no dict, or has keys that are no strings")
    target.update(zip(keys, items[1::2], strict=True))


def _append(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise ValueError("its pickle appends to what is no list")
    stack[-1].extend(items)


def _take(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("its pickle takes from an empty stack")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


# BUILD sets attributes: those of a state dict (`_metadata`) say nothing about its tensors.
_BUILDERS: dict[str, Callable[[list[Any]], object]] = {
    "MARK": lambda stack: stack.append(_Mark),
    "EMPTY_DICT": lambda stack: stack.append({}),
    "EMPTY_LIST": lambda stack: stack.append([]),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "TUPLE1": lambda stack: stack.append(tuple(_take(stack, 1))),
    "TUPLE2": lambda stack: stack.append(tuple(_take(stack, 2))),
    "TUPLE3": lambda stack: stack.append(tuple(_take(stack, 3))),
    "APPEND": lambda stack: _append(stack, _take(stack, 1)),
    "APPENDS": lambda stack: _append(stack, _since_mark(stack)),
    "SETITEM": lambda stack: _set_items(stack, _take(stack, 2)),
    "SETITEMS": lambda stack: _set_items(stack, _since_mark(stack)),
    "BUILD": lambda stack: stack.pop(),
}


def _unusable(path: pathlib.Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no file that torch.save wrote (1.6 or later), or a damaged copy ({why[:500]}): "
        "copy or download it again, or save it again as safetensors."
    )
