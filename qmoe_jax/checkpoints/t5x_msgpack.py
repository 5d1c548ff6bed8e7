# SPDX-License-Identifier: Apache-2.0
"""The msgpack encoding of state dicts that flax.serialization writes, bounded and lazy.

Arrays stay undecoded (`msgpack.ExtType`) until `decode_array`: a checkpoint's optimizer state is
never unpacked. Nothing is allocated on the word of a header: sizes are checked against the bytes.
"""

import math
import reprlib
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from jaxtyping import Shaped

from qmoe_jax.checkpoints.errors import CheckpointError

_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax.serialization's extension codes
_CHUNKED = "__msgpack_chunked_array__"
_MAX_RANK = 32
_MAX_LIST = 1 << 12  # the longest lists are shapes; msgpack preallocates what a header claims

_TYPES = (
    *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, np.complex64, np.complex128, ml_dtypes.bfloat16),
)
_DTYPES = {np.dtype(t).name: np.dtype(t) for t in _TYPES}
_ZARR_DTYPES = {np.dtype(t).str[1:]: np.dtype(t) for t in _TYPES if t is not ml_dtypes.bfloat16}


def parse_dtype(name: object) -> np.dtype:
    """The dtype of a name such as `float32` or `bfloat16`, or of a zarr name such as `<f4`."""
    if isinstance(name, str):
        found = _DTYPES.get(name) or _ZARR_DTYPES.get(name.lstrip("<>|"))
        if found is not None:
            return found
    raise CheckpointError(f"unknown dtype {reprlib.repr(name)}")


def parse_shape(value: object) -> tuple[int, ...]:
    """The shape given as a list of sizes."""
    if not isinstance(value, list | tuple) or len(value) > _MAX_RANK:
        raise CheckpointError(f"expected a shape, got {reprlib.repr(value)}")
    if not all(isinstance(size, int) and size >= 0 for size in value):
        raise CheckpointError(f"expected a shape, got {reprlib.repr(value)}")
    return tuple(int(size) for size in value)


def unpack(content: bytes) -> dict[str, Any]:
    """Decodes a whole msgpack file, arrays excepted.

    Raises:
      CheckpointError: it is not the msgpack of one dictionary.
    """
    tree = _unpack(content, raw=False)
    if not isinstance(tree, dict):
        raise CheckpointError(f"expected a dictionary, got {type(tree).__name__}")
    return tree


def _unpack(content: bytes, *, raw: bool) -> Any:
    try:
        return msgpack.unpackb(content, raw=raw, max_array_len=_MAX_LIST)
    except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException) as error:
        raise CheckpointError(f"malformed msgpack: {error}") from error


def is_array(value: object) -> bool:
    """Whether an unpacked value stands for an inline array or scalar."""
    return isinstance(value, msgpack.ExtType) or (isinstance(value, dict) and _CHUNKED in value)


def decode_array(value: Any) -> Shaped[np.ndarray, "..."]:
    """The array behind a value that `is_array`, read-only, without a copy where it is in one piece.

    Raises:
      CheckpointError: the value's shape, dtype and bytes do not fit together.
    """
    if isinstance(value, dict):
        return _join_chunks(value)
    if value.code == _COMPLEX:
        return np.asarray(_decode_complex(value.data))
    if value.code not in (_NDARRAY, _SCALAR):
        raise CheckpointError(f"unknown msgpack extension type {value.code}")
    fields = _unpack(value.data, raw=True)
    if not isinstance(fields, list) or len(fields) != 3 or not isinstance(fields[2], bytes):
        raise CheckpointError("expected an array as (shape, dtype, bytes)")
    shape, name, data = fields
    dtype = parse_dtype(name.decode("ascii", "replace") if isinstance(name, bytes) else name)
    return _reshape(np.frombuffer(_whole(data, dtype), dtype), parse_shape(shape))


def _whole(data: bytes, dtype: np.dtype) -> bytes:
    if len(data) % dtype.itemsize:
        raise CheckpointError(f"{len(data)} bytes are no whole number of {dtype.name} values")
    return data


def _reshape(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if math.prod(shape) != flat.size:
        raise CheckpointError(f"an array of shape {shape} came with {flat.size} values")
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError) as error:  # an empty array of an absurd shape
        raise CheckpointError(f"unusable shape {shape}: {error}") from error


def _decode_complex(data: bytes) -> complex:
    parts = _unpack(data, raw=True)
    if not isinstance(parts, list) or [type(part) for part in parts] != [float, float]:
        raise CheckpointError("expected a complex number as (real, imaginary)")
    return complex(*parts)


def _join_chunks(value: dict[str, Any]) -> np.ndarray:
    """flax splits arrays above 2^30 bytes; lists are dictionaries keyed "0", "1", ..."""
    shape = parse_shape(_as_list(value.get("shape")))
    pieces = []
    for piece in _as_list(value.get("chunks")):
        if not isinstance(piece, msgpack.ExtType):
            raise CheckpointError("a chunk of a split array is no array")
        pieces.append(decode_array(piece).reshape(-1))
    if not pieces or len({piece.dtype for piece in pieces}) != 1:
        raise CheckpointError("the chunks of a split array are missing or differ in dtype")
    return _reshape(np.concatenate(pieces), shape)


def _as_list(value: object) -> list[Any]:
    if not isinstance(value, dict) or set(value) != {str(i) for i in range(len(value))}:
        raise CheckpointError("a split array lacks its list of sizes or chunks")
    return [value[str(i)] for i in range(len(value))]


def encode_array(array: Shaped[np.ndarray, "..."]) -> msgpack.ExtType:
    """An inline array, as flax.serialization writes it."""
    fields = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(_NDARRAY, msgpack.packb(fields, use_bin_type=True))


def pack(tree: dict[str, Any]) -> bytes:
    """The msgpack of a tree of dictionaries, strings, ints, lists and encoded arrays."""
    packed = msgpack.packb(tree)
    assert packed is not None
    return packed
