# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint in the form that other programs read."""

import dataclasses
import functools
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import rich.console

from qmoe_jax.checkpoints import (
    array_files,
    huggingface_writer,
    orbax_pack,
    orbax_pack_writer,
    packed,
    packed_convert,
    source,
    t5x_export,
    t5x_msgpack,
    t5x_writer,
    vocabulary,
)
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.checkpoints.t5x_experts import ExpertGroup
from qmoe_jax.codec import packing
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack
from qmoe_jax.runs import progress
from qmoe_jax.runs.progress import Progress

_DRY = "dry run: inputs are sound, nothing was written"


def export(
    checkpoint_path: str,
    output_dir: str,
    export_format: Literal["t5x", "huggingface", "orbax", "packed"],
    *,
    export_codec: packing.Codec | None = None,
    export_dtype: Literal["float32", "bfloat16"] | None = None,
    max_shard_bytes: int = 5 << 30,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> None:
    """Writes a checkpoint of any readable format as another program's, or in another codec.

    Args:
      checkpoint_path: a packed checkpoint, a T5X checkpoint or a Hugging Face folder; what stays
        packed must be a packed checkpoint.
      output_dir: a new folder; for T5X the one that holds, or will hold, `checkpoint_{step}`.
      export_format: `"t5x"` and `"huggingface"` are dequantized, `"orbax"` stays packed as it is;
        `"packed"` is a packed checkpoint of `export_codec`.
      export_codec: `"qmoe"` or `"tunstall"`, of ternary experts.
      export_dtype: of what is dequantized; None: float32. What stays packed keeps what is stored.
      max_shard_bytes: of one file's tensors, for Hugging Face.
      dry_run: check everything and stop.
      console: where progress goes; None: standard output.

    Raises:
      ValueError: a damaged checkpoint, one that the format cannot express, a folder that is taken,
        too small a disk (all CheckpointError); a setting that cannot be.
    """
    console = console or rich.console.Console()
    output = pathlib.Path(output_dir)
    if max_shard_bytes < 1:
        raise ValueError(f"MAX_SHARD_BYTES is {max_shard_bytes}; expected 1 or more")
    if (export_format == "packed") != (export_codec is not None):
        raise ValueError(
            f"EXPORT_CODEC is {export_codec!r} with EXPORT_FORMAT {export_format!r}: give the one "
            f"of {packing.CODECS} that 'packed' is to have, and none for another format"
        )
    if export_format in ("orbax", "packed"):
        if export_dtype is not None:
            raise ValueError(
                f"EXPORT_DTYPE is {export_dtype!r}, but EXPORT_FORMAT {export_format} keeps what "
                "is stored: leave it None, or export to t5x or huggingface"
            )
        store = _packed_store(pathlib.Path(checkpoint_path), export_format)
        if export_codec is None:
            _export_orbax(store, output_dir, dry_run, console)
        else:
            _convert(store, output_dir, export_codec, dry_run, console)
        return
    # A T5X checkpoint whose chunks hold many experts is cut anew on the disk that it goes to.
    checkpoint = source.open_source(checkpoint_path, scratch_dir=_existing(output))
    dtype = export_dtype or "float32"
    if export_format == "t5x":
        t5x_writer.check(output_dir, checkpoint.step or 0)
    else:
        array_files.check_new(output_dir)
        huggingface_writer.check(checkpoint)
        _check_disk(output, huggingface_writer.nbytes(checkpoint.config, dtype))
    parameters = sum(map(math.prod, configs.param_shapes(checkpoint.config).values()))
    console.print(
        f"{checkpoint.path} ({checkpoint.format}): {parameters:,} parameters in {dtype}, "
        f"{parameters * t5x_msgpack.parse_dtype(dtype).itemsize:,} bytes",
        soft_wrap=True,
    )
    if dry_run:
        console.print(_DRY)
        return
    with progress.showing(float(parameters), console) as bar:
        watched = _watched(checkpoint, bar)
        if export_format == "t5x":
            written = t5x_export.save(output_dir, watched, dtype)
        else:
            written = huggingface_writer.save(
                output_dir, watched, dtype, max_shard_bytes=max_shard_bytes
            )
    _print_result(written, console)


def _packed_store(path: pathlib.Path, export_format: str) -> PackedCheckpoint:
    if not packed.is_packed(path):
        raise CheckpointError(
            f"{path} is no packed checkpoint, which is what EXPORT_FORMAT {export_format} takes: "
            "compress it first, or import a published pack."
        )
    return packed.open_checkpoint(path)


def _convert(
    store: PackedCheckpoint,
    output_dir: str,
    codec: packing.Codec,
    dry_run: bool,
    console: rich.console.Console,
) -> None:
    output = array_files.local_folder(output_dir)
    packed.check_free(output)
    packed_convert.check(store)
    files = len(store.files)
    console.print(
        f"{store.path} ({store.header.codec}): {files:,} files, {store.nbytes:,} bytes",
        soft_wrap=True,
    )
    if dry_run:
        console.print(_DRY)
        return
    with progress.showing(float(files), console) as bar:
        committed = functools.partial(progress.committed, bar)
        packed_convert.convert(store, output, codec, committed=committed)
    vocabulary.copy(store.path, output)
    _print_result(output, console)


def _export_orbax(
    store: PackedCheckpoint, output_dir: str, dry_run: bool, console: rich.console.Console
) -> None:
    array_files.check_new(output_dir)
    leaves = orbax_pack.leaves(store)
    nbytes = sum(leaf.nbytes for leaf in leaves.values())
    console.print(f"{store.path}: {len(leaves):,} arrays, {nbytes:,} bytes", soft_wrap=True)
    if dry_run:
        console.print(_DRY)
        return
    # Of each layer, as Orbax sorts them; its names have dots.
    last = max(name for name in leaves if "/mlp/expert/" in name).rpartition("/mlp/")[2]
    last = last.replace("/", ".")
    with progress.showing(float(nbytes), console) as bar:

        def written(name: str, size: int) -> None:
            progress.advance(bar, float(size), name, 0, 0.0)
            if name.endswith(last):
                progress.line(bar, name.rpartition(".mlp.")[0])

        result = orbax_pack_writer.save(output_dir, store, written=written)
    vocabulary.copy(store.path, result)
    _print_result(result, console)


def _watched(checkpoint: Source, bar: Progress) -> Source:
    """The same checkpoint; what is read of it is counted, in parameters."""

    def read(names: Sequence[str]) -> Mapping[str, np.ndarray]:
        arrays = checkpoint.read(names)
        count = sum(array.size for array in arrays.values())
        progress.advance(bar, float(count), "parameters that are no experts", 0, 0.0)
        return arrays

    def expert_groups(stack: Stack, layer: int, group_size: int) -> Iterator[ExpertGroup]:
        name = f"{stack} block {layer + 1}"
        for group in checkpoint.expert_groups(stack, layer, group_size):
            count = sum(array.size for array in group.arrays.values())
            progress.advance(bar, float(count), f"{name}, expert {group.stop}", 0, 0.0)
            if group.stop == checkpoint.config.num_experts:
                progress.line(bar, name)
            yield group

    return dataclasses.replace(checkpoint, read=read, expert_groups=expert_groups)


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The nearest folder above that is there already."""
    return next(path for path in folder.absolute().parents if path.is_dir())


def _check_disk(output: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(_existing(output)).free
    if needed > free:
        raise CheckpointError(
            f"{output} would take {needed:,} bytes, and its disk has {free:,} free: free space "
            "there, choose another OUTPUT_DIR, or EXPORT_DTYPE bfloat16."
        )


def _print_result(written: pathlib.Path, console: rich.console.Console) -> None:
    nbytes = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    console.print(f"{written}: {nbytes:,} bytes", soft_wrap=True)
