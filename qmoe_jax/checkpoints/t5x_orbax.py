# SPDX-License-Identifier: Apache-2.0
"""Tells the layouts of T5X checkpoints apart, and reads the index of those that Orbax wrote.

Three kinds, in `state/` below the step's directory or in the directory itself:
- early 2022: a msgpack `checkpoint` whose leaves are placeholders, below `_optimizer`;
- 2024 (Orbax 0.5): the same with `_METADATA` beside it; each placeholder names a zarr directory;
- 2026 (Orbax 0.11): no msgpack; `_METADATA` lists the leaves, the arrays lie in an OCDBT store.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from qmoe_jax.checkpoints import kvstore, t5x_tree
from qmoe_jax.checkpoints.errors import CheckpointError

_FILES = ("checkpoint", "_METADATA", "manifest.ocdbt")
_FOLDERS = ("", "state/")
_STEP_FILE = "_CHECKPOINT_METADATA"
MARKERS = (*(folder + name for folder in _FOLDERS for name in _FILES), _STEP_FILE)
_NODE_CACHE = 64 << 20  # bytes; without, each chunk's read fetches the index nodes above it again
_MAX_BYTES = 1 << 42  # one array; the largest of Switch-c is 1e11


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one checkpoint's index and arrays lie."""

    folder: str  # "" or "state/"
    content: bytes | None  # of the msgpack `checkpoint`
    metadata: bytes | None  # of Orbax's `_METADATA`
    arrays: ts.KvStore


def find_layout(store: ts.KvStore, location: str) -> Layout | None:
    """The layout of the checkpoint in a directory; None if it holds none.

    Raises:
      CheckpointError: an Orbax checkpoint of another program; a file cannot be read.
    """
    contents = kvstore.read_files(store, list(MARKERS))
    found = dict(zip(MARKERS, contents, strict=True))
    for folder in _FOLDERS:
        content, metadata, manifest = (found[folder + name] for name in _FILES)
        if content is None and metadata is None and manifest is None:
            continue
        if content is None and metadata is None:
            raise CheckpointError(
                f"{location}/{folder} has a `manifest.ocdbt` but no `_METADATA`: either the copy "
                "is incomplete, or it is no T5X checkpoint. Give the directory of a T5X step."
            )
        arrays = store / folder if folder else store
        if manifest is not None:
            arrays = open_ocdbt(arrays, location)
        return Layout(folder, content, metadata, arrays)
    if found[_STEP_FILE] is not None:
        raise CheckpointError(
            f"{location} is an Orbax checkpoint without T5X's folder `state`; give one that T5X "
            "saved, or copy the whole step again."
        )
    return None


def open_ocdbt(base: ts.KvStore, location: str) -> ts.KvStore:
    """The store of arrays in a directory with a `manifest.ocdbt`; `location` is its name in errors.

    Raises:
      CheckpointError: it cannot be opened.
    """
    cache = {"total_bytes_limit": _NODE_CACHE}
    base_spec = base.spec(retain_context=True).to_json()  # also how to retry and to log in
    spec = {"driver": "ocdbt", "base": base_spec, "cache_pool": cache}
    with kvstore.explained(location, "manifest.ocdbt"):
        return ts.KvStore.open(spec).result()


def read_metadata(content: bytes | None) -> dict[str, Any]:
    """The tree index of Orbax's `_METADATA`; empty if there is no such file.

    Raises:
      CheckpointError: the file is damaged, or says what this reader does not know.
    """
    if content is None:
        return {}
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"malformed JSON ({error}); copy the file again.") from error
    index = tree.get("tree_metadata") if isinstance(tree, dict) else None
    if not isinstance(index, dict):
        raise CheckpointError("no `tree_metadata`; this is no T5X checkpoint, or a damaged copy.")
    if tree.get("use_zarr3"):
        raise CheckpointError("its arrays are zarr v3; T5X writes v2, save it with T5X.")
    return index


def parameters(index: Mapping[str, Any]) -> dict[str, t5x_tree.Leaf | str]:
    """The zarr directories of the parameters that a `tree_metadata` lists, by parameter path.

    Raises:
      CheckpointError: an entry is malformed; no entry is below `target`.
    """
    found = {}
    for name, entry in index.items():
        keys = _keys(name, entry)
        if keys[0] == "target" and len(keys) > 1:
            path = "/".join(t5x_tree.checked_key(key) for key in keys[1:])
            found[path] = t5x_tree.inner_directory(".".join(keys))
    if not found:
        raise CheckpointError("it holds no `target` parameters; is it a T5X training state?")
    return found


def _keys(name: str, entry: Any) -> list[str]:
    parts = entry.get("key_metadata") if isinstance(entry, dict) else None
    if isinstance(parts, list) and parts:
        keys = [part.get("key") if isinstance(part, dict) else None for part in parts]
        texts = [key for key in keys if isinstance(key, str)]
        if len(texts) == len(parts):
            return texts
    raise CheckpointError(f"malformed entry {reprlib.repr(name)}; the file is damaged.")


def resolve(
    arrays: ts.KvStore, entries: Mapping[str, t5x_tree.Leaf | str], location: str
) -> dict[str, t5x_tree.Leaf]:
    """Leaves for all entries: what is a directory yet takes shape and dtype from its array.

    The arrays' metadata are read concurrently, their data not at all.

    Raises:
      CheckpointError: an array is missing, or its metadata are damaged.
    """
    pending = {
        name: kvstore.open_zarr(arrays, entry)
        for name, entry in entries.items()
        if isinstance(entry, str)
    }
    leaves = {}
    for name, entry in entries.items():
        if not isinstance(entry, str):
            leaves[name] = entry
            continue
        with kvstore.explained(location, name):
            array = pending[name].result()
            shape, dtype = tuple(array.shape), array.dtype.numpy_dtype
            if math.prod(shape) * dtype.itemsize > _MAX_BYTES:
                raise ValueError(f"`.zarray` says shape {shape}, more than any parameter's")
            leaves[name] = t5x_tree.Leaf(shape, dtype, entry)
    return leaves
