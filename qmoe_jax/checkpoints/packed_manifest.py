# SPDX-License-Identifier: Apache-2.0
"""What a packed store says of itself: the records of manifest and journal.

A manifest is a file like any other. It carries a checksum of its records; each field is checked for
its type and its range; and the arrays named in it must be exactly those of a model of that size,
each once, in its dtype and shape, before anything is believed.
"""

import dataclasses
import json
import pathlib
import zlib
from typing import Any, get_args

from qmoe_jax.checkpoints import array_files, packed_arrays
from qmoe_jax.checkpoints.array_files import FileEntry
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_arrays import Codec
from qmoe_jax.codec import uniform
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig

FORMAT = "qmoe_jax packed checkpoint"
VERSION = 1

_MAX_LAYERS = 4096
_MAX_SIZE = 2**31
_MAY_BE_ZERO = ("num_encoder_layers", "num_decoder_layers", "min_expert_capacity")


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known before the first group: enough to tell two runs apart."""

    config: SwitchConfig
    codec: Codec
    settings: dict[str, Any]  # of the quantizer and the calibration, as JSON values
    source: dict[str, Any]  # of the checkpoint that was compressed


@dataclasses.dataclass(frozen=True)
class GroupEntry:
    """Experts `start` to `stop` of one layer."""

    start: int
    stop: int
    file: FileEntry


@dataclasses.dataclass(frozen=True)
class PackedCheckpoint:
    """An opened store; no array has been read."""

    path: pathlib.Path
    header: Header
    params: dict[str, FileEntry]  # T5X path -> the file that holds it
    groups: dict[tuple[str, int], tuple[GroupEntry, ...]]  # (stack, layer) -> consecutive groups

    @property
    def files(self) -> dict[str, FileEntry]:
        """All array files by name."""
        groups = (group.file for groups in self.groups.values() for group in groups)
        return {file.name: file for file in (*self.params.values(), *groups)}

    @property
    def nbytes(self) -> int:
        """Bytes of all array files."""
        return sum(file.nbytes for file in self.files.values())


def header_line(header: Header) -> str:
    """The first line of a journal.

    Raises:
      ValueError: a header that `parse` would refuse when all the work is done.
    """
    line = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)})
    _header(json.loads(line))
    return line


def params_line(file: FileEntry) -> str:
    """The journal line of a file of uncompressed parameters."""
    return json.dumps({"kind": "params", "file": array_files.to_json(file)})


def experts_line(stack: str, layer: int, group: GroupEntry) -> str:
    """The journal line of a group of experts."""
    place = {"stack": stack, "layer": layer, "start": group.start, "stop": group.stop}
    return json.dumps({"kind": "experts", **place, "file": array_files.to_json(group.file)})


def from_journal(journal: bytes) -> dict[str, Any]:
    """The manifest of a journal: its lines as JSON values, and its checksum.

    Raises:
      ValueError: a line is not JSON.
    """
    header, *entries = (json.loads(line) for line in journal.splitlines())
    if not isinstance(header, dict):
        raise ValueError("the first line is not a header")
    return {**header, "journal_crc32": zlib.crc32(journal), "entries": entries}


def parse(path: pathlib.Path, manifest: Any, *, complete: bool = True) -> PackedCheckpoint:
    """The store at `path` as its manifest describes it.

    Args:
      path: of the store.
      manifest: JSON values.
      complete: whether all of the model must be there; else some of it may be.

    Raises:
      CheckpointError: not a manifest, or one of another version.
      ValueError: the checksum or a field is wrong, or the model is not complete.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has a manifest that is not of a packed checkpoint.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')}, this release reads {VERSION}: "
            "use the release that wrote it."
        )
    entries = array_files.field(manifest, "entries", list)
    if _journal_crc32(manifest) != array_files.size(manifest, "journal_crc32"):
        raise ValueError("its checksum does not match its records")
    header = _header(manifest)
    params, groups = _entries(entries)
    _check_params(header.config, params, complete)
    _check_groups(header, groups, complete)
    return PackedCheckpoint(path, header, params, groups)


def group_size(header: Header) -> int:
    """Columns that share a scale, as `UniformExperts` has it; of codec "uniform" only.

    Raises:
      ValueError: the header names an impossible one.
    """
    quantizer = header.settings.get("quantizer", {})
    if not isinstance(quantizer, dict):
        raise ValueError("the quantizer's settings are missing")
    columns = quantizer.get("group_size")
    if columns is None:
        return uniform.WHOLE_ROW
    if type(columns) is not int or not 0 < columns < _MAX_SIZE:
        raise ValueError(f"the quantizer's `group_size` is {columns!r}")
    return columns


def group_shapes(config: SwitchConfig, group: GroupEntry) -> dict[str, tuple[int, int, int]]:
    """Of each matrix of a group: its experts, its columns (in) and its rows (out)."""
    experts, D, F = group.stop - group.start, config.emb_dim, config.expert_mlp_dim
    matrices = configs.expert_matrices(config)
    return {name: (experts, F, D) if name == "wo" else (experts, D, F) for name in matrices}


def _journal_crc32(manifest: dict[str, Any]) -> int:
    """Of the journal written again: JSON values survive reading and writing unchanged."""
    header = {k: v for k, v in manifest.items() if k not in ("journal_crc32", "entries")}
    lines = (json.dumps(line) + "\n" for line in (header, *manifest["entries"]))
    return zlib.crc32("".join(lines).encode())


def _header(value: dict[str, Any]) -> Header:
    codec = array_files.field(value, "codec", str)
    if codec not in get_args(Codec):
        raise ValueError(f"codec {codec!r} is unknown")
    settings = array_files.field(value, "settings", dict)
    source = array_files.field(value, "source", dict)
    if source.get("step") is not None:
        array_files.size(source, "step")
    header = Header(_config(array_files.field(value, "config", dict)), codec, settings, source)
    group_size(header)
    return header


def _config(value: dict[str, Any]) -> SwitchConfig:
    fields = dataclasses.fields(SwitchConfig)
    config = SwitchConfig(**{field.name: _constant(field, value) for field in fields})
    for stack in configs.STACKS:
        layers = configs.num_layers(config, stack)
        sparse = configs.sparse_layers(config, stack)
        known = layers <= _MAX_LAYERS and all(layer in range(layers) for layer in sparse)
        if not known or list(sparse) != sorted(set(sparse)):
            raise ValueError(f"{stack} of {layers} layers, of which {sparse} are sparse")
    if config.mlp_activations not in (("relu",), ("gelu", "linear")):
        raise ValueError(f"model size `mlp_activations` is {config.mlp_activations}")
    return config


def _constant(field: dataclasses.Field, value: dict[str, Any]) -> Any:
    """One field of the model's sizes, of its own type. JSON has no tuples, and 2.0 may read 2."""
    item: Any = value.get(field.name)
    if field.type is float and type(item) in (int, float) and abs(item) < _MAX_SIZE:
        return float(item)
    if field.type is int and type(item) is int:
        if (0 if field.name in _MAY_BE_ZERO else 1) <= item < _MAX_SIZE:
            return item
    elif field.type is bool and type(item) is bool:
        return item
    elif field.type in (tuple[int, ...], tuple[str, ...]) and type(item) is list:
        kind = int if field.type == tuple[int, ...] else str
        if all(type(element) is kind for element in item):
            return tuple(item)
    raise ValueError(f"model size `{field.name}` is {item!r}")


def _entries(entries: list[Any]) -> tuple[dict[str, FileEntry], dict[tuple[str, int], tuple]]:
    """Parameters and groups; what stands there twice is refused."""
    names: set[str] = set()
    params: dict[str, FileEntry] = {}
    groups: dict[tuple[str, int], list[GroupEntry]] = {}
    for entry in entries:
        kind = array_files.field(entry, "kind", str)
        file = array_files.from_json(array_files.field(entry, "file", dict))
        if file.name in names or not params.keys().isdisjoint(file.arrays):
            raise ValueError(f"file {file.name!r}, or a parameter in it, is there twice")
        names.add(file.name)
        if kind == "params":
            params |= dict.fromkeys(file.arrays, file)
        elif kind == "experts":
            place = array_files.field(entry, "stack", str), array_files.size(entry, "layer")
            bounds = array_files.size(entry, "start"), array_files.size(entry, "stop")
            groups.setdefault(place, []).append(GroupEntry(*bounds, file))
        else:
            raise ValueError(f"entry of the unknown kind {kind!r}")
    ordered = {key: tuple(sorted(found, key=lambda g: g.start)) for key, found in groups.items()}
    return params, ordered


def _check_params(config: SwitchConfig, params: dict[str, FileEntry], complete: bool) -> None:
    """Every parameter that is not an expert's is there, in its shape, and no other."""
    shapes = configs.param_shapes(config)
    expected = {name: shape for name, shape in shapes.items() if "/mlp/expert/" not in name}
    if unknown := params.keys() - expected.keys():
        raise ValueError(f"parameter `{min(unknown)}` is not one of the model's")
    for name in expected if complete else params:
        shape = expected[name]
        entry = params[name].arrays[name] if name in params else None
        if entry is None or entry.shape != shape or entry.dtype not in packed_arrays.FLOATS:
            found = "nothing" if entry is None else f"{entry.dtype} of shape {entry.shape}"
            raise ValueError(f"parameter `{name}`: expected floats of shape {shape}, found {found}")


def _check_groups(
    header: Header, groups: dict[tuple[str, int], tuple[GroupEntry, ...]], complete: bool
) -> None:
    """Every expert is there once, with all its arrays, and no other."""
    config = header.config
    places = configs.sparse_places(config)
    if unknown := groups.keys() - set(places):
        raise ValueError(f"{'/layers_'.join(map(str, min(unknown)))} is not a sparse layer")
    for stack, layer in places:
        at = 0
        for group in groups.get((stack, layer), ()):
            if (
                not (group.start == at if complete else group.start >= at)
                or group.stop <= group.start
            ):
                found = f"experts {group.start} to {group.stop}"
                raise ValueError(
                    f"{stack}/layers_{layer}: expert {at} expected next, found {found}"
                )
            _check_arrays(header, group)
            at = group.stop
        if at > config.num_experts or (complete and at < config.num_experts):
            raise ValueError(f"{stack}/layers_{layer} has {at} experts, not {config.num_experts}")


def _check_arrays(header: Header, group: GroupEntry) -> None:
    expected = {
        f"{matrix}/{key}": kind
        for matrix, shape in group_shapes(header.config, group).items()
        for key, kind in packed_arrays.layout(header.codec, group_size(header), shape).items()
    }
    arrays = group.file.arrays
    if arrays.keys() != expected.keys():
        raise ValueError(f"{group.file.name!r} holds {sorted(arrays)}, expected {sorted(expected)}")
    for key, (dtypes, shape) in expected.items():
        found = arrays[key].shape
        fits = len(found) == len(shape) and all(
            wanted in (length, None) for length, wanted in zip(found, shape, strict=True)
        )
        if not fits or arrays[key].dtype not in dtypes:
            raise ValueError(
                f"array {key!r} of {group.file.name!r}: expected {' or '.join(dtypes)} of shape "
                f"{shape}, found {arrays[key].dtype} of shape {found}"
            )
