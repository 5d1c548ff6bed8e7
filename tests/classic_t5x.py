# SPDX-License-Identifier: Apache-2.0
"""Classic T5X checkpoints of any encoding and chunking, made without the code under test."""

import pathlib
from typing import Any

import flax.serialization
import flax.traverse_util
import numpy as np
import tensorstore as ts

GZIP = {"id": "gzip", "level": 1}
ZSTD = {"id": "zstd", "level": 1}


def write_array(
    directory: pathlib.Path, values: np.ndarray, chunks: tuple[int, ...], compressor: dict
) -> None:
    """One zarr array, as tensorstore writes it for T5X."""
    metadata = {"shape": values.shape, "chunks": chunks, "compressor": compressor}
    spec = {
        "driver": "zarr",
        "dtype": values.dtype.name,
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "metadata": metadata,
    }
    ts.open(spec, create=True, delete_existing=True).result().write(values).result()


def array_spec(name: str, values: np.ndarray) -> dict[str, Any]:
    """A parameter's spec; its chunks and compressor are untrue on purpose."""
    return {
        "driver": "zarr",
        "dtype": values.dtype.name,
        "kvstore": {"driver": "file", "path": f"target.{name.replace('/', '.')}/"},
        "metadata": {"shape": list(values.shape), "chunks": [1], "compressor": {"id": "blosc"}},
    }


def write_msgpack(directory: pathlib.Path, leaves: dict[str, Any], **top: Any) -> None:
    """The file `checkpoint` with `leaves` (arrays or specs, by path) as its parameters."""
    target = flax.traverse_util.unflatten_dict(leaves, sep="/")
    tree = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(7)}}, **top}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))


def write_checkpoint(
    directory: pathlib.Path,
    params: dict[str, np.ndarray],
    chunks: dict[str, tuple[int, ...]] | None = None,
    compressor: dict | None = None,
) -> None:
    """A checkpoint of zarr arrays, in one chunk each unless `chunks` says otherwise."""
    write_msgpack(directory, {name: array_spec(name, values) for name, values in params.items()})
    for name, values in params.items():
        folder = directory / f"target.{name.replace('/', '.')}"
        write_array(folder, values, (chunks or {}).get(name, values.shape), compressor or GZIP)


def file_reads() -> int:
    """Files that tensorstore has read in this process."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/read")
    return sum(m["values"][0]["value"] for m in metrics if m["name"].endswith("/read"))


def write_files(directory: pathlib.Path, files: dict[str, bytes]) -> None:
    """Files of any content, by their paths below `directory`."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
