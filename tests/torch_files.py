# SPDX-License-Identifier: Apache-2.0
"""Files such as `torch.save` writes, made without torch."""

import dataclasses
import math
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

# dtype -> what torch calls its storage
STORAGES = {
    "float32": "Float",
    "bfloat16": "BFloat16",
    "int16": "Short",
    "int32": "Int",
    "int64": "Long",
}


@dataclasses.dataclass(frozen=True)
class Global:
    """Pickled as a bare reference to `module.name`, whatever that is."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """Pickled as a call of `function` with `arguments`."""

    function: Global
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Persistent:
    """Pickled as the persistent id `value`."""

    value: tuple[Any, ...]


def dumps(value: Any) -> bytes:
    """A pickle of protocol 2; an OrderedDict is pickled as torch's state dicts are."""
    return pickle.PROTO + b"\x02" + _opcodes(value) + pickle.STOP


def _opcodes(value: Any) -> bytes:
    if isinstance(value, Global):
        return pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return _opcodes(value.function) + _opcodes(value.arguments) + pickle.REDUCE
    if isinstance(value, Persistent):
        return _opcodes(value.value) + pickle.BINPERSID
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(map(_opcodes, value)) + pickle.TUPLE
    if isinstance(value, list):
        items = b"".join(map(_opcodes, value))
        return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
    if isinstance(value, OrderedDict):
        empty = _opcodes(Call(Global("collections", "OrderedDict"), ()))
        return empty + _items(value) + _opcodes({"_metadata": {}}) + pickle.BUILD
    if isinstance(value, dict):
        return pickle.EMPTY_DICT + _items(value)
    return pickle.dumps(value, 2)[2:-1]  # a constant, without the first and the last opcode


def _items(value: dict[str, Any]) -> bytes:
    items = b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items())
    return pickle.MARK + items + pickle.SETITEMS


def tensor(
    key: str,
    dtype: str,
    count: int,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Call:
    """A tensor of the storage `key`, which holds `count` values."""
    kind = Global("torch", f"{STORAGES[dtype]}Storage")
    storage = Persistent(("storage", kind, key, "cpu", count))
    arguments = (storage, offset, shape, strides, False, OrderedDict())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def write(path: pathlib.Path, tree: Any, storages: Mapping[str, bytes]) -> None:
    """A file of `tree` and the storages by their keys."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", dumps(tree))
        archive.writestr("model/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"model/data/{key}", content)
        archive.writestr("model/version", "3\n")


def write_state_dict(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A state dict of contiguous tensors, each with a storage of its own."""
    tree, storages = OrderedDict(), {}
    for key, (name, array) in enumerate(arrays.items()):
        shape = array.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(array.ndim))
        tree[name] = tensor(str(key), array.dtype.name, array.size, 0, shape, strides)
        storages[str(key)] = np.ascontiguousarray(array).tobytes()
    write(path, tree, storages)
