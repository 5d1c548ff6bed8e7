# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints of the classic T5X layout, version 3, that T5X itself reads.

Arrays go one by one, experts in slices, into a directory beside the final one, which takes its name
only when all is written (T5X: checkpoints.Checkpointer.save does the same). Every expert is a chunk
of its own, so that it can be read alone; other arrays are cut by rows below T5X's 64 MiB a chunk.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from flax.traverse_util import unflatten_dict
from jaxtyping import Shaped

from qmoe_jax.checkpoints import array_files, kvstore, t5x_msgpack
from qmoe_jax.checkpoints.errors import CheckpointError

_VERSION = 3
_CHUNK_BYTES = 64 << 20
_COMPRESSOR = {"id": "gzip", "level": 1}


@dataclasses.dataclass(frozen=True)
class Writer:
    """A checkpoint being written; use it with `add` and `add_experts`."""

    directory: pathlib.Path  # still under its temporary name
    dtype: np.dtype | None
    specs: dict[str, dict[str, Any]]  # by name, as they go into the msgpack
    missing: dict[str, np.ndarray]  # by name, per expert: not written yet


@contextlib.contextmanager
def create(
    path: str | os.PathLike[str], *, step: int, dtype: np.dtype | type | None = None
) -> Iterator[Writer]:
    """Opens `{path}/checkpoint_{step}` for writing; it appears when the block ends well.

    Args:
      path: local directory that holds the steps; made if need be.
      step: training step, 0 or more, within int32.
      dtype: dtype that all arrays are cast to; None keeps each array's own.

    Raises:
      CheckpointError: the checkpoint exists already; `path` is a URL; an expert was left out; the
        disk is full. Nothing remains of a checkpoint that was not finished.
    """
    check(path, step)
    target = checkpoint_path(path, step)
    directory = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    with _explained(target):
        directory.mkdir(parents=True)
    try:
        writer = Writer(directory, None if dtype is None else np.dtype(dtype), {}, {})
        yield writer
        with _explained(target):
            _finish(writer, target, step)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def checkpoint_path(path: str | os.PathLike[str], step: int) -> pathlib.Path:
    """The directory of a step."""
    return pathlib.Path(path).absolute() / f"checkpoint_{step}"


def check(path: str | os.PathLike[str], step: int) -> None:
    """Checks that the step may be written below `path`.

    Raises:
      CheckpointError: it exists already; `path` is a URL; no such step can be.
    """
    array_files.local_folder(path)
    if not 0 <= step < 1 << 31:
        raise CheckpointError(f"expected a step from 0 to 2^31 - 1, got {step}")
    _refuse_existing(checkpoint_path(path, step))


def _refuse_existing(target: pathlib.Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already: remove it, or choose another directory.")


@contextlib.contextmanager
def _explained(what: str | pathlib.Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except kvstore.FAILURES as error:
        raise CheckpointError(f"cannot write {what}: {error}") from error


def _finish(writer: Writer, target: pathlib.Path, step: int) -> None:
    for name, missing in writer.missing.items():
        if missing.any():
            raise CheckpointError(
                f"`{name}` of {target} lacks {missing.sum()} of its {missing.size} experts, the "
                f"first {missing.argmax()}: write them all before the checkpoint is closed."
            )
    tree = {
        "version": _VERSION,
        "optimizer": {
            "target": unflatten_dict(dict(writer.specs), sep="/"),
            "state": {"step": t5x_msgpack.encode_array(np.array(step, np.int32))},
        },
    }
    store = kvstore.open_store(str(writer.directory))
    store.write("checkpoint", t5x_msgpack.pack(tree)).result()
    _refuse_existing(target)
    os.rename(writer.directory, target)


def add(writer: Writer, name: str, array: Shaped[np.ndarray, "..."]) -> None:
    """Writes one parameter whole, experts excepted.

    Args:
      writer: from `create`.
      name: path in the parameter tree, such as `encoder/layers_0/mlp/wi/kernel`.
      array: its values.

    Raises:
      CheckpointError: the name is unusable or taken; the disk is full.
    """
    dtype = array.dtype if writer.dtype is None else writer.dtype
    store = _create_array(writer, name, array.shape, _row_chunks(array.shape, dtype), dtype)
    with _explained(f"`{name}`"):
        store.write(array.astype(dtype, copy=False)).result()


def _row_chunks(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    rows = max(1, _CHUNK_BYTES // row_bytes)
    return tuple(max(1, size) for size in (*(min(rows, n) for n in shape[:1]), *shape[1:]))


def add_experts(
    writer: Writer, name: str, shape: tuple[int, int, int], dtype: np.dtype | type
) -> Callable[[int, Shaped[np.ndarray, " group in out"]], None]:
    """Begins a stack of experts that is written slice by slice.

    Args:
      writer: from `create`.
      name: path in the parameter tree, such as `encoder/layers_1/mlp/expert/wi/kernel`.
      shape: `[experts, in, out]`.
      dtype: of the values, unless the writer has one of its own.

    Returns:
      A function of the first expert's index and the values `[group, in, out]`; it returns when they
      are written. Every expert is written once, in any order.

    Raises:
      CheckpointError: the name is unusable or taken; later, a slice that does not fit.
    """
    dtype = np.dtype(dtype) if writer.dtype is None else writer.dtype
    store = _create_array(writer, name, shape, (1, *shape[1:]), dtype)
    missing = writer.missing[name] = np.ones(shape[0], np.bool_)

    def write(start: int, experts: np.ndarray) -> None:
        stop = start + len(experts)
        if experts.shape[1:] != shape[1:] or not 0 <= start <= stop <= shape[0]:
            raise CheckpointError(
                f"experts {start}..{stop} of shape {experts.shape} do not fit `{name}` {shape}"
            )
        if not missing[start:stop].all():
            raise CheckpointError(f"experts {start}..{stop} of `{name}` are written already")
        with _explained(f"`{name}`"):
            store[start:stop].write(experts.astype(dtype, copy=False)).result()
        missing[start:stop] = False

    return write


def _create_array(
    writer: Writer, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype
) -> ts.TensorStore:
    _check_name(writer, name)
    directory = f"target.{name.replace('/', '.')}/"
    metadata = {"chunks": list(chunks), "compressor": _COMPRESSOR, "shape": list(shape)}
    spec = {
        "driver": "zarr",
        "dtype": t5x_msgpack.parse_dtype(dtype.name).name,
        "metadata": metadata,
    }
    here = kvstore.open_store(str(writer.directory)) / directory
    with _explained(f"`{name}`"):
        store = ts.open(spec, kvstore=here, create=True).result()
    writer.specs[name] = {**spec, "kvstore": {"driver": "file", "path": directory}}
    return store


def _check_name(writer: Writer, name: str) -> None:
    if not all(part and part.strip(".") for part in name.split("/")):
        raise CheckpointError(f"`{name}` is no path of a parameter, such as `encoder/wi/kernel`")
    flat = name.replace("/", ".")
    for other in writer.specs:
        if (
            other.replace("/", ".") == flat
            or f"{name}/".startswith(f"{other}/")
            or (f"{other}/".startswith(f"{name}/"))
        ):
            raise CheckpointError(f"`{name}` cannot be added beside `{other}`")


def save(
    path: str | os.PathLike[str],
    params: Mapping[str, Shaped[np.ndarray, "..."]],
    step: int,
    dtype: np.dtype | type | None = None,
) -> pathlib.Path:
    """Writes a whole checkpoint; see `create`.

    Args:
      path: directory that holds the steps.
      params: by path in the parameter tree; `.../expert/...` of three axes are stacked experts.
      step: training step.
      dtype: dtype to cast to, or None.

    Returns:
      The checkpoint's directory.
    """
    with create(path, step=step, dtype=dtype) as writer:
        for name, array in params.items():
            if "expert" in name.split("/") and array.ndim == 3:
                add_experts(writer, name, array.shape, array.dtype)(0, array)
            else:
                add(writer, name, array)
    return checkpoint_path(path, step)
