# SPDX-License-Identifier: Apache-2.0
"""The parameters of a T5X state dict, by path: what its msgpack says of each (T5X: checkpoints.py).

A leaf is an inline array, a TensorStore spec that points to a zarr array beside the file, or (where
Orbax wrote) a placeholder that names one. Of a spec only path, shape and dtype count: driver,
bucket, chunks and compressor were the writer's.
"""

import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.checkpoints import t5x_msgpack
from qmoe_jax.checkpoints.errors import CheckpointError

PLACEHOLDER = "PLACEHOLDER://"
_NATIVE_BFLOAT16 = 3  # from this version on; before it, bfloat16 was stored as its uint16 bits


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: its metadata, and its values only where the msgpack held them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    directory: str | None  # of its zarr array, within the checkpoint's store; None if inline
    inline: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


def parameters(tree: dict[str, Any], version: int) -> dict[str, Leaf | str]:
    """The leaves of a `target` tree as msgpack gave it, by path such as `encoder/.../kernel`.

    Of a placeholder only the zarr array's directory is known; it stands for the leaf.

    Raises:
      CheckpointError: a leaf is malformed.
    """
    return {name: _leaf(name, value, version) for name, value in _flatten(tree)}


def _flatten(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Leaves by their path, in the file's order; iterative, for the depth is the file's choice."""
    pending = [iter([("", tree)])]
    while pending:
        for name, value in pending[-1]:
            if not isinstance(value, dict) or _is_spec(value) or t5x_msgpack.is_array(value):
                yield name, value
            else:
                prefix = name and f"{name}/"
                pending.append(iter([(f"{prefix}{checked_key(k)}", v) for k, v in value.items()]))
                break
        else:
            pending.pop()


def checked_key(key: object) -> str:
    """One component of a parameter's path."""
    if not isinstance(key, str) or not key or "/" in key:
        raise CheckpointError(f"unusable parameter name {reprlib.repr(key)}; the file is damaged.")
    return key


def _is_spec(value: dict[str, Any]) -> bool:
    return value.keys() >= {"driver", "kvstore", "metadata"}


def _leaf(name: str, value: Any, version: int) -> Leaf | str:
    try:
        if isinstance(value, str) and value.startswith(PLACEHOLDER):
            return inner_directory(value.removeprefix(PLACEHOLDER))
        if t5x_msgpack.is_array(value):
            inline = t5x_msgpack.decode_array(value)
            inline = inline.view(meant_dtype(inline.dtype, version))
            return Leaf(inline.shape, inline.dtype, None, inline)
        if isinstance(value, dict):
            return _spec_leaf(value, version)
    except CheckpointError as error:
        raise CheckpointError(f"`{name}`: {error}; the file is damaged.") from error
    raise CheckpointError(
        f"`{name}` is neither an array nor a TensorStore spec: {reprlib.repr(value)}"
    )


def meant_dtype(dtype: np.dtype, version: int) -> np.dtype:
    """The dtype of the values, in a file of that version, that are stored as `dtype`."""
    if version < _NATIVE_BFLOAT16 and dtype == np.uint16:
        return np.dtype(ml_dtypes.bfloat16)
    return dtype


def _spec_leaf(spec: dict[str, Any], version: int) -> Leaf:
    metadata, store = spec["metadata"], spec["kvstore"]
    if not isinstance(metadata, dict) or not isinstance(store, dict):
        raise CheckpointError("its TensorStore spec lacks `metadata` or `kvstore`")
    if "transform" in spec:
        raise CheckpointError("its TensorStore spec has a `transform`, which T5X never writes")
    path = store.get("path", spec.get("path"))  # TensorStore before 0.1.14 wrote it at the top
    directory = inner_directory(path)
    dtype = t5x_msgpack.parse_dtype(spec.get("dtype", metadata.get("dtype")))
    shape = t5x_msgpack.parse_shape(metadata.get("shape"))
    return Leaf(shape, meant_dtype(dtype, version), directory)


def inner_directory(path: object) -> str:
    """A path below the checkpoint's, with a final slash; nothing that could lead out of it."""
    parts = path.removesuffix("/").split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise CheckpointError(f"its path {reprlib.repr(path)} does not lie within the checkpoint")
    return "/".join(parts) + "/"
