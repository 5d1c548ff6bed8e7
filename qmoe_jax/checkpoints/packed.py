# SPDX-License-Identifier: Apache-2.0
"""The packed store: a compressed checkpoint on disk.

    manifest.json                          what the checkpoint is; written last
    journal.jsonl                          one line for the header, then one for each commit
    params/encoder.layers_0.bin            what stays uncompressed
    experts/encoder.layers_1.0000-0015.bin the packed experts of one group, all their matrices

Every commit is one file, synced to disk before its journal line is. So after a crash the journal
names whole files only. The manifest holds the header and all entries again, with the checksum of
the journal; a store without one is unfinished, and can be taken up again (`reopen`). No pickle: raw
arrays and JSON.

Arrays of a group are named by matrix and part, as `wi/codes`; `packed_arrays.py` says which.
"""

import contextlib
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import array_files, packed_arrays, packed_manifest
from qmoe_jax.checkpoints.array_files import FileEntry
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_arrays import Experts
from qmoe_jax.checkpoints.packed_manifest import GroupEntry, Header, PackedCheckpoint
from qmoe_jax.codec import packing
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"


def check_free(path: pathlib.Path, beside: Collection[str] = ()) -> None:
    """Checks that a store may be made at `path`: a new folder, or an empty one.

    Args:
      path: of the store.
      beside: names that may be there already.

    Raises:
      CheckpointError: the folder holds something else, or is none.
    """
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - {*beside}):
        state = "a finished" if (path / MANIFEST).exists() else "an unfinished"
        known = f"{state} packed checkpoint" if is_packed(path) else "other files"
        raise CheckpointError(
            f"{path} holds {known}: choose a new OUTPUT_DIR, or remove it if it is not needed."
        )


def create(path: pathlib.Path, header: Header, beside: Collection[str] = ()) -> None:
    """Starts a store in a new or empty folder; `beside` as in `check_free`.

    Raises:
      CheckpointError: the folder holds something, or cannot be written.
      ValueError: a header that no store can have.
    """
    line = packed_manifest.header_line(header)
    check_free(path, beside)
    array_files.write_text(path / JOURNAL, f"{line}\n")


def reopen(path: pathlib.Path, *, clean: bool = True) -> PackedCheckpoint:
    """Takes up a store where it was left; `clean` drops what no line of its journal names.

    Returns:
      What is committed; of each layer that can be some groups only.

    Raises:
      CheckpointError: the journal or a committed file is damaged.
    """
    try:
        if clean:
            array_files.drop_cut_line(path / JOURNAL)
        manifest = packed_manifest.from_journal((path / JOURNAL).read_bytes())
        checkpoint = packed_manifest.parse(path, manifest, complete=False)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path / JOURNAL} is damaged ({error}): the compression cannot go on; remove {path} "
            "and start it again."
        ) from error
    _check_files(checkpoint)
    for file in (*path.glob("params/*"), *path.glob("experts/*")):
        if clean and file.relative_to(path).as_posix() not in checkpoint.files:
            file.unlink()
    return checkpoint


def commit_params(
    path: pathlib.Path, name: str, params: Mapping[str, Shaped[np.ndarray, "..."]]
) -> FileEntry:
    """Adds uncompressed parameters, named by their T5X paths, as file `params/{name}.bin`.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    file = array_files.write_arrays(path, f"params/{name}.bin", params)
    array_files.append_line(path / JOURNAL, packed_manifest.params_line(file))
    return file


def commit_experts(
    path: pathlib.Path, stack: Stack, layer: int, start: int, experts: Mapping[str, Experts]
) -> FileEntry:
    """Adds the experts from `start` on of one layer; see `write_experts`."""
    group = write_experts(path, stack, layer, start, experts)
    commit_line(path, packed_manifest.experts_line(stack, layer, group))
    return group.file


def write_experts(
    path: pathlib.Path, stack: Stack, layer: int, start: int, experts: Mapping[str, Experts]
) -> GroupEntry:
    """Writes the experts from `start` on of one layer, which are not committed by that.

    Args:
      path: of the store.
      stack, layer, start: where they stand.
      experts: matrix names to their records.

    Returns:
      What the journal must hold of them.

    Raises:
      CheckpointError: the disk is full or cannot be written.
      ValueError: matrices of different numbers of experts, or one that cannot be stored exactly.
    """
    counts = {matrix: record.shape[0] for matrix, record in experts.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"matrices of one group must have equally many experts, got {counts}")
    stop = start + next(iter(counts.values()))
    arrays = {
        f"{matrix}/{key}": array
        for matrix, record in experts.items()
        for key, array in packed_arrays.to_arrays(record).items()
    }
    name = f"experts/{stack}.layers_{layer}.{start:04d}-{stop - 1:04d}.bin"
    file = array_files.write_arrays(path, name, arrays)
    return GroupEntry(start, stop, file)


def commit_line(path: pathlib.Path, line: str) -> None:
    """Adds a line to the journal, about what has been written (`packed_manifest.experts_line`).

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    array_files.append_line(path / JOURNAL, line)


def finish(path: pathlib.Path) -> PackedCheckpoint:
    """Writes the manifest, which makes the store complete, and opens it.

    Raises:
      CheckpointError: something is missing from the store, or it cannot be written.
    """
    try:
        manifest = packed_manifest.from_journal((path / JOURNAL).read_bytes())
        checkpoint = packed_manifest.parse(path, manifest)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path / JOURNAL} is not that of a complete checkpoint ({error}): compress again into "
            "a new folder."
        ) from error
    _check_files(checkpoint)
    array_files.write_text(path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return checkpoint


def is_packed(path: pathlib.Path) -> bool:
    """Whether `path` looks like a packed store, finished or not."""
    return (path / MANIFEST).exists() or (path / JOURNAL).exists()


def open_checkpoint(path: pathlib.Path) -> PackedCheckpoint:
    """Reads the manifest and checks it and the sizes of all files; reads no array.

    Raises:
      CheckpointError: the store is unfinished, of another version, or damaged.
    """
    if not (path / MANIFEST).exists():
        known = "it is not finished: the `compress` that began it goes on if run again."
        unknown = "it is not a packed checkpoint."
        raise CheckpointError(f"{path} has no {MANIFEST}: {known if is_packed(path) else unknown}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        checkpoint = packed_manifest.parse(path, manifest)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} is damaged ({error}): restore it from a copy or compress again."
        ) from error
    _check_files(checkpoint)
    return checkpoint


def read_params(
    checkpoint: PackedCheckpoint, names: list[str] | tuple[str, ...]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Uncompressed parameters by their T5X paths, in the stored dtype.

    Raises:
      CheckpointError: a name is unknown, or a file is damaged.
    """
    read = {}
    for name in names:
        if name not in checkpoint.params:
            raise CheckpointError(f"{checkpoint.path} has no parameter `{name}`.")
        read[name] = array_files.read_array(checkpoint.path, checkpoint.params[name], name)
    return read


def check_params(
    checkpoint: PackedCheckpoint, params: Mapping[str, Shaped[np.ndarray, "..."]], what: str
) -> None:
    """Checks by their checksums that `params` are what is stored under their names.

    Raises:
      CheckpointError: they are not; `what` says whence they come.
    """
    for name, array in params.items():
        if array_files.checksum(array) != checkpoint.params[name].arrays[name].crc32:
            raise CheckpointError(
                f"{what}: `{name}` is not what {checkpoint.path} was begun with: give the "
                "checkpoint that it was, or choose another OUTPUT_DIR"
            )


def read_group(checkpoint: PackedCheckpoint, group: GroupEntry) -> dict[str, Experts]:
    """The matrices of one committed group, checked so that a kernel can rely on them.

    Raises:
      CheckpointError: a file is damaged, or words and row lengths do not fit each other.
    """
    path, file, header = checkpoint.path, group.file, checkpoint.header
    columns = packed_manifest.group_size(header)
    experts = {}
    for matrix, shape in packed_manifest.group_shapes(header.config, group).items():
        layout = packed_arrays.layout(header.codec, columns, shape)
        arrays = {key: array_files.read_array(path, file, f"{matrix}/{key}") for key in layout}
        with _as_the_manifest_says(checkpoint, group, matrix):
            experts[matrix] = packed_arrays.from_arrays(arrays, header.codec, columns, shape)
    return experts


def read_groups(
    checkpoint: PackedCheckpoint, stack: Stack, layer: int, start: int = 0
) -> Iterator[tuple[GroupEntry, dict[str, Experts]]]:
    """The groups of one layer in expert order, from that of expert `start` on; see `read_group`.

    Raises:
      ValueError: a layer without experts.
    """
    for group in _layer_groups(checkpoint, stack, layer):
        if group.stop > start:
            yield group, read_group(checkpoint, group)


def _layer_groups(checkpoint: PackedCheckpoint, stack: Stack, layer: int) -> tuple[GroupEntry, ...]:
    if (stack, layer) not in checkpoint.groups:
        raise ValueError(f"{stack}/layers_{layer} of {checkpoint.path} has no experts")
    return checkpoint.groups[stack, layer]


def load_experts(
    checkpoint: PackedCheckpoint, stack: Stack, layer: int, slabs: int = 1
) -> dict[str, PackedExperts]:
    """All experts of one layer of a ternary store as one record for each matrix.

    Raises:
      CheckpointError: see `read_group`.
      ValueError: another codec, a layer without experts, or experts that do not divide by `slabs`.
    """
    _check_ternary(checkpoint)
    groups = [experts for _, experts in read_groups(checkpoint, stack, layer)]
    return {
        matrix: packed_lib.join([group[matrix] for group in groups], slabs)  # pyright: ignore
        for matrix in configs.expert_matrices(checkpoint.header.config)
    }


def slab_words(
    checkpoint: PackedCheckpoint, stack: Stack, layer: int, slabs: int
) -> dict[str, int]:
    """By matrix, the words of the longest slab of `load_experts`; reads no words.

    Raises:
      CheckpointError: a file is damaged, or words and row lengths do not fit each other.
      ValueError: see `load_experts`.
    """
    _check_ternary(checkpoint)
    groups, words = _layer_groups(checkpoint, stack, layer), {}
    for matrix in configs.expert_matrices(checkpoint.header.config):
        sizes = [_expert_sizes(checkpoint, group, matrix) for group in groups]
        _, words[matrix] = packed_lib.expert_layout(np.concatenate(sizes), slabs)
    return words


def _check_ternary(checkpoint: PackedCheckpoint) -> None:
    if checkpoint.header.codec not in packing.CODECS:
        raise ValueError(f"codec {checkpoint.header.codec!r} holds no ternary experts")


def _expert_sizes(
    checkpoint: PackedCheckpoint, group: GroupEntry, matrix: str
) -> Int[np.ndarray, " experts"]:
    file = group.file
    lengths, nonzeros = (
        array_files.read_array(checkpoint.path, file, key) if key in file.arrays else None
        for key in (f"{matrix}/row_lengths", f"{matrix}/nonzeros")
    )
    (units,) = file.arrays[f"{matrix}/codes"].shape
    with _as_the_manifest_says(checkpoint, group, matrix):
        return packed_arrays.expert_sizes(units, lengths, nonzeros)  # pyright: ignore


@contextlib.contextmanager
def _as_the_manifest_says(
    checkpoint: PackedCheckpoint, group: GroupEntry, matrix: str
) -> Iterator[None]:
    """Names the file and the matrix in what a check raises inside."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path / group.file.name}: `{matrix}` is not what the manifest says "
            f"({error}): restore the file from a copy or compress again."
        ) from error


def load_layer(checkpoint: PackedCheckpoint, stack: Stack, layer: int) -> dict[str, Experts]:
    """All experts of one layer of a ternary or `uniform` store, as one record for each matrix.

    Raises:
      CheckpointError: see `read_group`.
      ValueError: another codec, or a layer without experts.
    """
    if checkpoint.header.codec != "uniform":
        return dict(load_experts(checkpoint, stack, layer))
    groups: list[Any] = [experts for _, experts in read_groups(checkpoint, stack, layer)]
    matrices = configs.expert_matrices(checkpoint.header.config)
    return {name: packed_lib.join_uniform([group[name] for group in groups]) for name in matrices}


def _check_files(checkpoint: PackedCheckpoint) -> None:
    for file in checkpoint.files.values():
        path = checkpoint.path / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.nbytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{path} {found}, expected {file.nbytes} bytes: restore it from a copy or "
                "compress again."
            )
