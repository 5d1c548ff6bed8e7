# SPDX-License-Identifier: Apache-2.0
"""Reads T5X checkpoints of every layout (T5X: t5x/checkpoints.py).

Classic: `checkpoint_{step}/checkpoint` is one msgpack file, a tree whose leaves are inline arrays
or point to zarr v2 arrays in directories beside it; opening reads that file alone. What Orbax wrote
for T5X lies one folder deeper, in `state/`; see `t5x_orbax`.
"""

import dataclasses
import difflib
import functools
import math
import os
import pathlib
import re
import reprlib
import types
from collections.abc import Mapping, Sequence

import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from qmoe_jax.checkpoints import kvstore, remote, t5x_msgpack, t5x_orbax, t5x_tree
from qmoe_jax.checkpoints.errors import CheckpointError, NoCheckpointError

_MAX_SLACK = 1 << 30  # bytes by which one chunk may exceed its whole array


@dataclasses.dataclass(frozen=True)
class T5xCheckpoint:
    """An opened checkpoint: no array has been read."""

    path: str  # the step's directory or URL
    step: int | None
    version: int  # 3 also stands for Orbax, which has none and keeps dtypes as they are
    store: ts.KvStore  # in which the leaves' directories lie; it caches what it reads of an index
    leaves: Mapping[str, t5x_tree.Leaf]  # "encoder/layers_1/mlp/expert/wi/kernel" -> leaf


def open_checkpoint(path: str | os.PathLike[str]) -> T5xCheckpoint:
    """Reads a checkpoint's index and no array; the layout shows by its files.

    Where Orbax wrote, the index knows no shapes: they come from each array's own metadata.

    Args:
      path: directory of a step (or its `state`), or the directory above it, whose newest step is
        then taken; local or a URL that TensorStore can open.

    Raises:
      CheckpointError: a malformed file, or one that cannot be read (NoCheckpointError: nothing
        there, or another format).
    """
    location = kvstore.location(path)
    store = kvstore.open_store(location)
    layout = t5x_orbax.find_layout(store, location)
    if layout is None:
        return open_checkpoint(f"{location}/checkpoint_{_newest_step(store, location)}")
    step, version, entries = _read_index(layout, location)
    leaves = t5x_orbax.resolve(layout.arrays, entries, location)
    return T5xCheckpoint(location, step, version, layout.arrays, types.MappingProxyType(leaves))


def _read_index(
    layout: t5x_orbax.Layout, location: str
) -> tuple[int | None, int, dict[str, t5x_tree.Leaf | str]]:
    """Step, version and parameters."""
    index = "_METADATA"
    try:
        tree_index = t5x_orbax.read_metadata(layout.metadata)
        if layout.content is None:
            return _named_step(location), 3, t5x_orbax.parameters(tree_index)
        index = "checkpoint"
        return _parse(location, layout.content, orbax=layout.metadata is not None)
    except CheckpointError as error:
        raise CheckpointError(f"{location}/{layout.folder}{index}: {error}") from error


def _newest_step(store: ts.KvStore, location: str) -> int:
    """The largest step below a directory, of any format: an older readable one is no substitute."""
    steps = _steps_of_url(store) if remote.is_url(location) else _steps_of_folder(location)
    if not steps:
        # Google's driver takes a refused listing, of whatever reason, for an empty one.
        same = "; a bucket that does not exist, or may not be listed, looks the same"
        raise NoCheckpointError(
            f"{location} holds neither a T5X checkpoint (a file `checkpoint`, or Orbax's "
            "`state/_METADATA`) nor directories `checkpoint_{step}` with one; give the directory "
            f"of the step{same if location.startswith('gs://') else ''}."
        )
    return max(steps)


def _steps_of_url(store: ts.KvStore) -> list[int]:
    markers = "|".join(re.escape(name) for name in t5x_orbax.MARKERS)
    pattern = re.compile(rf"checkpoint_(\d+)/(?:{markers})")
    matches = [pattern.fullmatch(name) for name in kvstore.list_files(store, "checkpoint_")]
    return [int(match[1]) for match in matches if match]


def _steps_of_folder(location: str) -> list[int]:
    """Through links, and without a look at the files of arrays."""
    steps = []
    try:
        for folder in pathlib.Path(location).glob("checkpoint_*"):
            match = re.fullmatch(r"checkpoint_(\d+)", folder.name)
            if match and any((folder / name).exists() for name in t5x_orbax.MARKERS):
                steps.append(int(match[1]))
    except OSError as error:
        raise CheckpointError(
            f"cannot look for steps in {location}: {error.strerror}. Give the step's directory."
        ) from error
    return steps


def _parse(
    location: str, content: bytes, *, orbax: bool
) -> tuple[int | None, int, dict[str, t5x_tree.Leaf | str]]:
    if content.startswith(b"model_checkpoint_path"):
        raise CheckpointError(
            "this is the index of a TensorFlow checkpoint; convert it first "
            "(T5X: checkpoints.Checkpointer.convert_from_tf_checkpoint)."
        )
    try:
        tree = t5x_msgpack.unpack(content)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; this is no T5X checkpoint, or a damaged copy.") from error
    orbax = orbax or "_optimizer" in tree  # the latter: Orbax of early 2022, without `_METADATA`
    version = tree.get("version", 3 if orbax else 0)
    if isinstance(version, bool) or version not in (0, 2, 3):
        raise CheckpointError(
            f"version {reprlib.repr(version)}; this reader knows versions 0, 2 and 3."
        )
    key = "_optimizer" if "_optimizer" in tree else "optimizer"
    state = tree.get(key) if key in tree or (version and not orbax) else tree
    if not isinstance(state, dict) or not isinstance(state.get("target"), dict):
        raise CheckpointError("it holds no `target` parameters; is it a T5X training state?")
    entries = t5x_tree.parameters(state["target"], int(version))
    return _step(state.get("state"), location), int(version), entries


def _step(state: object, location: str) -> int | None:
    """The training step: as stored, else as in the directory's name."""
    if isinstance(state, dict) and "step" in state:
        value = state["step"]
        if isinstance(value, str) and value.startswith(t5x_tree.PLACEHOLDER):
            return _named_step(location)
        step = t5x_msgpack.decode_array(value) if t5x_msgpack.is_array(value) else value
        if isinstance(step, np.ndarray) and step.size == 1 and step.dtype.kind in "iu":
            return int(step.item())
        if isinstance(step, int):
            return int(step)
        raise CheckpointError(
            f"its `step` is no integer: {reprlib.repr(value)}; the file is damaged."
        )
    return _named_step(location)


def _named_step(location: str) -> int | None:
    match = re.search(r"checkpoint_(\d+)(?:/state)?$", location)
    return int(match[1]) if match else None


def shapes(checkpoint: T5xCheckpoint) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, by its path in the tree."""
    return {name: leaf.shape for name, leaf in checkpoint.leaves.items()}


def nbytes(checkpoint: T5xCheckpoint) -> int:
    """Of all parameters as stored, before any compression of chunks."""
    leaves = checkpoint.leaves.values()
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def find_leaf(checkpoint: T5xCheckpoint, name: str) -> t5x_tree.Leaf:
    """The parameter of that path.

    Raises:
      CheckpointError: there is none; the message suggests a near one.
    """
    if name in checkpoint.leaves:
        return checkpoint.leaves[name]
    near = difflib.get_close_matches(name, checkpoint.leaves, n=1, cutoff=0.0)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise CheckpointError(f"{checkpoint.path} has no parameter `{name}`.{hint}")


def open_arrays(checkpoint: T5xCheckpoint, names: Sequence[str]) -> dict[str, ts.TensorStore]:
    """Opens those of the named parameters that are zarr arrays, concurrently.

    An array of a version-2 file may hold uint16 where its leaf says bfloat16: the same bits.

    Raises:
      CheckpointError: unknown name; `.zarray` missing, malformed or unlike what opening found.
    """
    directories = {name: find_leaf(checkpoint, name).directory for name in names}
    pending = {
        name: kvstore.open_zarr(checkpoint.store, directory)
        for name, directory in directories.items()
        if directory is not None
    }
    arrays = {}
    for name, future in pending.items():
        with kvstore.explained(checkpoint.path, name):
            arrays[name] = future.result()
            _check_array(arrays[name], checkpoint.leaves[name], checkpoint.version)
    return arrays


def _check_array(array: ts.TensorStore, leaf: t5x_tree.Leaf, version: int) -> None:
    if tuple(array.shape) != leaf.shape:
        raise ValueError(f"the index says shape {leaf.shape}, `.zarray` {tuple(array.shape)}")
    dtype = array.dtype.numpy_dtype
    if t5x_tree.meant_dtype(dtype, version) != leaf.dtype:
        raise ValueError(f"the index says dtype {leaf.dtype.name}, `.zarray` {dtype.name}")
    # TensorStore allocates a whole chunk before it looks at the file.
    chunk_bytes = math.prod(_stored_chunks(array)) * dtype.itemsize
    if chunk_bytes > math.prod(leaf.shape) * dtype.itemsize + _MAX_SLACK:
        raise ValueError(f"`.zarray` says {chunk_bytes} bytes a chunk, more than the whole array")


def chunk_shape(checkpoint: T5xCheckpoint, name: str) -> tuple[int, ...]:
    """Shape of the chunks a parameter is stored in, at most its own; its own if it is inline.

    Raises:
      CheckpointError: see `open_arrays`.
    """
    leaf = find_leaf(checkpoint, name)
    if leaf.directory is None:
        return leaf.shape
    return clipped_chunks(open_arrays(checkpoint, [name])[name])


def clipped_chunks(array: ts.TensorStore) -> tuple[int, ...]:
    """An array's chunk shape, at most the array's own."""
    return tuple(map(min, _stored_chunks(array), array.shape))


def _stored_chunks(array: ts.TensorStore) -> tuple[int, ...]:
    return tuple(size or 1 for size in array.chunk_layout.read_chunk.shape or ())


def read_many(
    checkpoint: T5xCheckpoint, names: Sequence[str]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads several parameters concurrently, each in its stored dtype, into fresh arrays.

    Raises:
      CheckpointError: unknown name; a file missing, damaged or unlike what opening found.
    """
    pending, values = {}, {}
    arrays = open_arrays(checkpoint, names)
    for name, array in arrays.items():
        with kvstore.explained(checkpoint.path, name):
            # NumPy says what it cannot allocate; TensorStore would end the process.
            values[name] = np.empty(array.shape, array.dtype.numpy_dtype)
            pending[name] = _write(values[name], array)
    for name in names:
        leaf = checkpoint.leaves[name]
        if leaf.inline is not None:
            values[name] = leaf.inline.copy()
            continue
        with kvstore.explained(checkpoint.path, name):
            again = functools.partial(_write, values[name], arrays[name])
            kvstore.finished(pending[name], again)
        values[name] = values[name].view(leaf.dtype)
    return {name: values[name] for name in names}


def _write(into: np.ndarray, array: ts.TensorStore) -> ts.WriteFutures:
    return ts.array(into).write(array)


def read(checkpoint: T5xCheckpoint, name: str) -> Shaped[np.ndarray, "..."]:
    """Reads one parameter; see `read_many`."""
    return read_many(checkpoint, [name])[name]
