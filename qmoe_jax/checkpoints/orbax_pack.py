# SPDX-License-Identifier: Apache-2.0
"""The packed checkpoint as a standard Orbax checkpoint, and back without loss.

One tree, which Orbax restores alone and shards: T5X's names nested; where T5X has an expert's
`kernel`, the arrays of its packed record, all experts of a layer stacked along axis 0:

    qmoe      codes [slabs, words], expert_bases, row_starts, row_values: those of `PackedExperts`
    tunstall  the same, trees and sign_starts
    uniform   codes, scale, zero: those of `UniformExperts`, in the dtypes of the store
    dense     kernel, [experts, in, out] as it is

Stacked by layer, not by stored group: an array that is to be cut along its experts must be one
array. The groups' bounds stand in the metadata, with the store's whole manifest, whose checksums
tell that what comes back is what went out.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Shaped

from pallas_kernels import packed as packed_lib
from pallas_kernels import validation
from pallas_kernels.packed import PackedExperts, UniformExperts
from qmoe_jax.checkpoints import (
    array_files,
    kvstore,
    packed,
    packed_arrays,
    packed_manifest,
    t5x_orbax,
    t5x_tree,
)
from qmoe_jax.checkpoints.array_files import FileEntry
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_arrays import Arrays, Experts
from qmoe_jax.checkpoints.packed_manifest import GroupEntry, PackedCheckpoint
from qmoe_jax.codec import packing
from qmoe_jax.models.config import Stack

FORMAT = "qmoe_jax packed checkpoint in Orbax"
VERSION = 1
PACKED_PARTS = {
    "qmoe": ("codes", "expert_bases", "row_starts", "row_values"),
    "tunstall": ("codes", "expert_bases", "row_starts", "row_values", "trees", "sign_starts"),
}

_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file
_UNIFORM_PARTS = ("codes", "scale", "zero")
_AGAIN = "copy it again, or export again."


@dataclasses.dataclass(frozen=True)
class OrbaxPack:
    """An opened checkpoint; no array has been read."""

    path: pathlib.Path
    manifest: dict[str, Any]  # that of the packed store
    store: PackedCheckpoint  # what the manifest says; its files lie elsewhere, if anywhere
    arrays: ts.KvStore


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the tree."""

    dtype: str
    shape: tuple[int | None, ...]  # None: the data decide
    nbytes: int  # without what pads slabs


def is_orbax_pack(folder: pathlib.Path) -> bool:
    """Whether `folder` looks like what `save` writes."""
    try:
        return _read_metadata(folder)["custom_metadata"]["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def open_checkpoint(folder: pathlib.Path) -> OrbaxPack:
    """Reads the metadata; every array of the tree must be there, in its dtype and shape.

    Raises:
      CheckpointError: of another version, or damaged.
    """
    path = folder.absolute()
    with _damaged(f"{path}"):
        found = array_files.field(_read_metadata(path), "custom_metadata", dict)
        if found.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has format version {found.get('version')}, this release reads {VERSION}: "
                "use the release that wrote it."
            )
        manifest = array_files.field(found, "manifest", dict)
        store = packed_manifest.parse(path, manifest)
        arrays = t5x_orbax.open_ocdbt(kvstore.open_store(str(path)), str(path))
        _check_tree(store, t5x_orbax.resolve(arrays, _directories(leaves(store)), str(path)))
    return OrbaxPack(path, manifest, store, arrays)


def custom_metadata(store: PackedCheckpoint, manifest: dict[str, Any]) -> dict[str, Any]:
    """What stands in Orbax's custom metadata; `records` for those who restore with Orbax alone."""
    records = static_fields(store)
    return {"format": FORMAT, "version": VERSION, "manifest": manifest, "records": records}


def leaves(store: PackedCheckpoint) -> dict[str, Leaf]:
    """The arrays of the tree by their paths, such as `encoder/layers_1/mlp/expert/wi/codes`.

    Raises:
      CheckpointError: groups of one layer that cannot be stacked.
    """
    found = {}
    for name, file in store.params.items():
        entry = file.arrays[name]
        found[name] = Leaf(entry.dtype, entry.shape, entry.nbytes)
    for (stack, layer), groups in store.groups.items():
        for matrix, shape in _matrix_shapes(store).items():
            prefix = f"{stack}/layers_{layer}/mlp/expert/{matrix}"
            for part, leaf in _matrix_leaves(groups, store.header.codec, matrix, shape).items():
                found[f"{prefix}/{part}"] = leaf
    return found


def static_fields(store: PackedCheckpoint) -> dict[str, dict[str, Any]]:
    """What a record has beside its arrays, by the path of its matrix; JSON values."""
    codec, fields = store.header.codec, {}
    for (stack, layer), groups in store.groups.items():
        for matrix, (E, C, R) in _matrix_shapes(store).items():
            named: dict[str, Any] = {"shape": [E, R, C]}
            if codec in PACKED_PARTS:
                named |= {"type": "PackedExperts", "codec": codec}
            elif codec == "uniform":
                bits = groups[0].file.arrays[f"{matrix}/codes"].shape[-1]
                columns = packed_manifest.group_size(store.header)
                named |= {"type": "UniformExperts", "bits": bits, "group_size": columns}
            else:
                continue
            fields[f"{stack}/layers_{layer}/mlp/expert/{matrix}"] = named
    return fields


def records(checkpoint: OrbaxPack, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A restored tree with each packed matrix's arrays made one record.

    The arrays may be NumPy's or JAX's, on one device or sharded along axis 0; they are taken as
    they are. What did not come from a trusted place goes through `import_checkpoint`, which checks
    every word.

    Args:
      checkpoint: from `open_checkpoint`.
      tree: as Orbax restored it.

    Returns:
      The same tree, where `tree["encoder"]["layers_1"]["mlp"]["expert"]["wi"]` and the like are
      `PackedExperts` or `UniformExperts`; of a dense store it is unchanged.

    Raises:
      KeyError: the tree lacks a part of a matrix.
    """
    flat: dict[str, Any] = dict(flatten_dict(dict(tree), sep="/"))
    for path, static in static_fields(checkpoint.store).items():
        shape = tuple(static["shape"])
        if static["type"] == "PackedExperts":
            codec = static["codec"]
            parts = {part: flat.pop(f"{path}/{part}") for part in PACKED_PARTS[codec]}
            flat[path] = PackedExperts(**parts, shape=shape, codec=codec)
        else:
            codes, scale, zero = (flat.pop(f"{path}/{field}") for field in _UNIFORM_PARTS)
            flat[path] = UniformExperts(
                codes=codes,
                scale=scale.astype(jnp.float32),
                zero=zero.astype(jnp.float32),
                shape=shape,
                bits=static["bits"],
                group_size=static["group_size"],
            )
    return unflatten_dict(flat, sep="/")


def import_checkpoint(
    checkpoint: OrbaxPack,
    output_dir: pathlib.Path,
    *,
    committed: Callable[[str, bool], None] = lambda where, layer_done: None,
) -> PackedCheckpoint:
    """Writes the packed store again: the same files, groups and manifest, bit for bit.

    Memory holds the packed experts of one layer twice.

    Args:
      checkpoint: from `open_checkpoint`.
      output_dir: a new or empty folder.
      committed: called after each of the manifest's entries with what was written, and whether it
        completes a layer's experts.

    Raises:
      CheckpointError: the checkpoint is damaged, or the store cannot be written.
    """
    store, files = checkpoint.store, checkpoint.store.files
    packed.create(output_dir, store.header)

    held: dict[tuple[Stack, int], dict[str, PackedExperts | Arrays]] = {}  # one layer
    for entry in checkpoint.manifest["entries"]:
        file = files[entry["file"]["name"]]
        if entry["kind"] == "params":
            name = file.name.removeprefix("params/").removesuffix(".bin")
            done = packed.commit_params(output_dir, name, _read(checkpoint, list(file.arrays)))
            _check_same(checkpoint, done, file)
            committed(name, False)
            continue
        stack, layer = place = entry["stack"], entry["layer"]
        if place not in held:
            held.clear()
            held[place] = _layer(checkpoint, stack, layer)
        group = GroupEntry(entry["start"], entry["stop"], file)
        experts = _group(checkpoint, group, held[place])
        done = packed.commit_experts(output_dir, stack, layer, group.start, experts)
        _check_same(checkpoint, done, file)
        experts_in_all = store.header.config.num_experts
        where = f"{stack} block {layer + 1}, {experts_in_all} experts"
        committed(where, group.stop == experts_in_all)
    return packed.finish(output_dir)


def _read_metadata(folder: pathlib.Path) -> Any:
    return json.loads((folder / _METADATA).read_bytes())


def _matrix_shapes(store: PackedCheckpoint) -> dict[str, tuple[int, int, int]]:
    """Of each matrix, all experts of a layer: experts, columns (in), rows (out)."""
    config = store.header.config
    everything = GroupEntry(0, config.num_experts, FileEntry("", 0, {}))
    return packed_manifest.group_shapes(config, everything)


def _matrix_leaves(
    groups: tuple[GroupEntry, ...], codec: str, matrix: str, shape: tuple[int, int, int]
) -> dict[str, Leaf]:
    """The stacked arrays of one matrix."""
    stored = [group.file.arrays for group in groups]
    E, _, R = shape
    if codec in PACKED_PARTS:
        words = sum(arrays[f"{matrix}/codes"].nbytes for arrays in stored)
        starts = Leaf("uint32", (E, R + 1), 4 * E * (R + 1))
        parts = {
            "codes": Leaf("uint16", (None, None), words),
            "expert_bases": Leaf("uint32", (E,), 4 * E),
            "row_starts": starts,
            "row_values": Leaf("bfloat16", (E, R, 2), 4 * E * R),
            "trees": Leaf("uint8", (E,), E),
            "sign_starts": starts,
        }
        return {part: parts[part] for part in PACKED_PARTS[codec]}
    found = {}
    for key, first in stored[0].items():
        if not key.startswith(f"{matrix}/"):
            continue
        alike = {(arrays[key].dtype, arrays[key].shape[1:]) for arrays in stored}
        if len(alike) > 1:
            raise CheckpointError(
                f"`{key}` differs between the files {groups[0].file.name} and "
                f"{groups[-1].file.name} in dtype or bits, {sorted(alike)}: they cannot be one "
                "array; compress again."
            )
        nbytes = sum(arrays[key].nbytes for arrays in stored)
        found[key.removeprefix(f"{matrix}/")] = Leaf(first.dtype, (E, *first.shape[1:]), nbytes)
    return found


def _directories(names: Iterable[str]) -> dict[str, str]:
    """Where Orbax puts the arrays of these paths."""
    return {name: t5x_tree.inner_directory(name.replace("/", ".")) for name in names}


def _check_tree(store: PackedCheckpoint, found: Mapping[str, t5x_tree.Leaf]) -> None:
    """The arrays on disk are those of the manifest: sizes are believed from here on."""
    for name, leaf in leaves(store).items():
        shape, dtype = found[name].shape, found[name].dtype.name
        fits = _words_fit(store, leaf, shape) if None in leaf.shape else shape == leaf.shape
        if dtype != leaf.dtype or not fits:
            raise ValueError(
                f"`{name}` is {dtype} {shape}, expected {leaf.dtype} of shape {leaf.shape} and "
                f"about {leaf.nbytes} bytes"
            )


def _words_fit(store: PackedCheckpoint, leaf: Leaf, shape: tuple[int, ...]) -> bool:
    """Whether slabs of this shape may hold the words.

    A word of "qmoe" stands for 2 to 28 weights, so the largest expert has at most 14 times the
    words of the smallest, and the padded slabs at most 14 times the words of all. An expert of
    "tunstall" may be empty: one slab may hold all the words, and the others are as large.
    """
    experts, words = store.header.config.num_experts, leaf.nbytes // 2
    if len(shape) != 2 or shape[0] < 1 or experts % shape[0]:
        return False
    most = words * (14 if store.header.codec == "qmoe" else shape[0])
    return words <= math.prod(shape) <= most + packed_lib.BLOCK_WORDS * experts


def _read(checkpoint: OrbaxPack, names: list[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Some arrays of the tree, one after another."""
    read = {}
    for name, directory in _directories(names).items():
        with kvstore.explained(str(checkpoint.path), name):
            array = kvstore.open_zarr(checkpoint.arrays, directory).result()
            read[name] = array.read().result()
    return read


@contextlib.contextmanager
def _damaged(what: str) -> Iterator[None]:
    """Turns what a check raises inside into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged ({error}): {_AGAIN}") from error


def _layer(checkpoint: OrbaxPack, stack: Stack, layer: int) -> dict[str, PackedExperts | Arrays]:
    """Of each matrix of a layer its record, words checked, or its stacked arrays by name."""
    header = checkpoint.store.header
    prefix = f"{stack}/layers_{layer}/mlp/expert/"
    names = [name for name in leaves(checkpoint.store) if name.startswith(prefix)]
    read = _read(checkpoint, names)
    found = {}
    for matrix, (E, C, R) in _matrix_shapes(checkpoint.store).items():
        path = f"{prefix}{matrix}/"
        arrays = {key.removeprefix(path): read[key] for key in names if key.startswith(path)}
        if header.codec in PACKED_PARTS:
            found[matrix] = PackedExperts(**arrays, shape=(E, R, C), codec=header.codec)
            with _damaged(f"{checkpoint.path}: `{path[:-1]}`"):
                validation.validate(found[matrix], packing.entries(header.codec))
        else:
            found[matrix] = arrays
    return found


def _group(
    checkpoint: OrbaxPack, group: GroupEntry, layer: Mapping[str, PackedExperts | Arrays]
) -> dict[str, Experts]:
    """The records of one stored group, cut out of its layer's, in the order of its file."""
    header, count = checkpoint.store.header, group.stop - group.start
    shapes = packed_manifest.group_shapes(header.config, group)
    experts = {}
    for matrix in dict.fromkeys(key.partition("/")[0] for key in group.file.arrays):
        whole = layer[matrix]
        if isinstance(whole, PackedExperts):
            experts[matrix] = packed_lib.expert_slice(whole, group.start, count)
            continue
        part = {key: array[group.start : group.stop] for key, array in whole.items()}
        columns = packed_manifest.group_size(header)
        with _damaged(f"{checkpoint.path}: `{matrix}` of {group.file.name}"):
            experts[matrix] = packed_arrays.from_arrays(part, header.codec, columns, shapes[matrix])
    return experts


def _check_same(checkpoint: OrbaxPack, written: FileEntry, expected: FileEntry) -> None:
    if written != expected:
        found = written.arrays
        wrong = [key for key, entry in expected.arrays.items() if found.get(key) != entry]
        raise CheckpointError(
            f"{checkpoint.path}: `{(wrong or list(expected.arrays))[0]}` is not what "
            f"{expected.name} held when it was exported: {_AGAIN}"
        )
