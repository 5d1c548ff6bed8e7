# SPDX-License-Identifier: Apache-2.0
"""Shows what a checkpoint holds, from its metadata alone."""

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.table

from qmoe_jax.checkpoints import formats, huggingface, orbax_pack, packed, published, t5x
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One parameter; of experts, all of a layer's."""

    name: str  # T5X path
    shape: tuple[int, ...]
    dtype: str  # or the codec of what is packed
    nbytes: int  # as stored, before any compression of chunks
    pieces: str  # how it is cut up on disk; "" if nothing tells


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint is; no value of a parameter has been read."""

    path: str
    format: formats.Format
    config: SwitchConfig
    step: int | None
    nbytes: int  # of all parameters as stored
    arrays: tuple[StoredArray, ...]
    # What a packed checkpoint says of its making; JSON values.
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def experts(self) -> tuple[StoredArray, ...]:
        """The matrices of experts."""
        return tuple(array for array in self.arrays if "/mlp/expert/" in array.name)


def inspect_checkpoint(
    checkpoint_path: str,
    *,
    list_parameters: bool = False,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> Description:
    """Prints what a checkpoint of any format holds.

    Args:
      checkpoint_path: T5X's, Hugging Face's, a packed checkpoint (also in Orbax), or a pack of
        the published code.
      list_parameters: also print every parameter.
      dry_run: changes nothing, for nothing is ever written.
      console: where it goes; None: standard output.

    Raises:
      ValueError: no checkpoint, or a damaged one (CheckpointError).
    """
    console = console or rich.console.Console()
    description = describe(checkpoint_path)
    console.print(description.path, soft_wrap=True, markup=False, highlight=False)
    console.print(summary(description))
    if list_parameters:
        console.print(parameter_table(description))
    return description


def describe(path: str | os.PathLike[str]) -> Description:
    """Reads the metadata of the checkpoint at `path`.

    Raises:
      CheckpointError: there is none, or it is damaged.
      ValueError: its parameters are not those of a Switch Transformer.
    """
    match formats.detect(path):
        case "packed":
            return _packed(packed.open_checkpoint(pathlib.Path(path)))
        case "published":
            return _published(published.open_checkpoint(pathlib.Path(path)))
        case "orbax":
            return _orbax(orbax_pack.open_checkpoint(pathlib.Path(path)))
        case "huggingface":
            return _huggingface(huggingface.open_checkpoint(pathlib.Path(path)))
        case "t5x":
            return _t5x(formats.open_t5x(path))


def summary(description: Description) -> rich.table.Table:
    """The checkpoint in about fifteen lines."""
    config = description.config
    table = rich.table.Table("", rich.table.Column(overflow="fold"), show_header=False)
    table.add_row("format", description.format)
    table.add_row("step", "unknown" if description.step is None else f"{description.step:,}")
    for stack in configs.STACKS:
        sparse = ", ".join(map(str, configs.sparse_layers(config, stack)))
        layers = f"{configs.num_layers(config, stack)} layers, with experts: {sparse or 'none'}"
        table.add_row(stack, layers)
    table.add_row("experts", f"{config.num_experts:,} a layer")
    table.add_row("sizes", _sizes(config))
    logits = "through the embedding" if config.logits_via_embedding else "a matrix of their own"
    table.add_row("logits", logits)
    shapes = configs.param_shapes(config)
    parameters = sum(map(math.prod, shapes.values()))
    of_experts = sum(math.prod(shape) for name, shape in shapes.items() if "/mlp/expert/" in name)
    table.add_row("parameters", f"{parameters:,}, {of_experts:,} of them in experts")
    table.add_row("bytes", f"{description.nbytes:,}")
    table.add_row("bits per parameter", f"{8 * description.nbytes / parameters:.3f}")
    if description.experts:
        bits = 8 * sum(array.nbytes for array in description.experts) / of_experts
        table.add_row("bits per expert weight", f"{bits:.3f}")
        table.add_row("dtypes", _dtypes(description))
        pieces = dict.fromkeys(f"{a.name.split('/')[-2]} {a.pieces}" for a in description.experts)
        table.add_row("experts in", "\n".join(pieces))
    for group, values in description.provenance.items():
        for name, value in values.items():
            table.add_row(f"{group}: {name}", str(value))
    return table


def parameter_table(description: Description) -> rich.table.Table:
    """Every parameter by its T5X path."""
    table = rich.table.Table("parameter", "shape", "dtype", "bytes")
    for array in description.arrays:
        shape = " x ".join(map(str, array.shape))
        table.add_row(array.name, shape, array.dtype, f"{array.nbytes:,}")
    return table


def _sizes(config: SwitchConfig) -> str:
    return (
        f"vocabulary {config.vocab_size:,}, width {config.emb_dim:,}, {config.num_heads} heads of "
        f"{config.head_dim}, MLP {config.mlp_dim:,}, expert {config.expert_mlp_dim:,}, "
        f"{' x '.join(config.mlp_activations)}"
    )


def _dtypes(description: Description) -> str:
    counts = collections.Counter[str]()
    for array in description.arrays:
        counts[array.dtype] += array.nbytes
    return ", ".join(f"{dtype} {nbytes:,} bytes" for dtype, nbytes in counts.most_common())


def _t5x(checkpoint: t5x.T5xCheckpoint) -> Description:
    config = configs.config_from_shapes(t5x.shapes(checkpoint))
    opened = t5x.open_arrays(checkpoint, list(checkpoint.leaves))  # a missing one shows
    arrays = []
    for name, leaf in checkpoint.leaves.items():
        pieces = ""
        if name in opened and "/mlp/expert/" in name:
            pieces = f"in chunks of {' x '.join(map(str, t5x.clipped_chunks(opened[name])))}"
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        arrays.append(StoredArray(name, leaf.shape, leaf.dtype.name, nbytes, pieces))
    return Description(
        path=checkpoint.path,
        format="t5x",
        config=config,
        step=checkpoint.step,
        nbytes=t5x.nbytes(checkpoint),
        arrays=tuple(arrays),
    )


def _huggingface(checkpoint: huggingface.HfCheckpoint) -> Description:
    shapes = configs.param_shapes(checkpoint.config)
    arrays = []
    for name, stored in checkpoint.params.items():
        dtype = stored[0].dtype
        pieces = "one tensor an expert" if "/mlp/expert/" in name else ""
        nbytes = math.prod(shapes[name]) * dtype.itemsize
        arrays.append(StoredArray(name, shapes[name], dtype.name, nbytes, pieces))
    return Description(
        path=str(checkpoint.path),
        format="huggingface",
        config=checkpoint.config,
        step=None,
        nbytes=checkpoint.nbytes,
        arrays=tuple(arrays),
    )


def _packed(store: PackedCheckpoint) -> Description:
    header = store.header
    return Description(
        path=str(store.path),
        format="packed",
        config=header.config,
        step=header.source.get("step"),
        nbytes=store.nbytes,
        arrays=tuple(_packed_arrays(store)),
        provenance={"source": header.source, "settings": header.settings},
    )


def _packed_arrays(store: PackedCheckpoint) -> Iterator[StoredArray]:
    shapes = configs.param_shapes(store.header.config)
    for name, file in store.params.items():
        entry = file.arrays[name]
        yield StoredArray(name, entry.shape, entry.dtype, entry.nbytes, "")
    for (stack, layer), groups in store.groups.items():
        largest = max(group.stop - group.start for group in groups)
        pieces = f"{len(groups)} file{'s'[: len(groups) > 1]} of up to {largest} experts"
        for matrix in configs.expert_matrices(store.header.config):
            name = f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel"
            nbytes = sum(
                entry.nbytes
                for group in groups
                for key, entry in group.file.arrays.items()
                if key.startswith(f"{matrix}/")
            )
            yield StoredArray(name, shapes[name], store.header.codec, nbytes, pieces)


def _orbax(checkpoint: orbax_pack.OrbaxPack) -> Description:
    """The packed checkpoint that it holds; sizes are those that it has as such."""
    description = _packed(checkpoint.store)
    arrays = tuple(
        dataclasses.replace(array, pieces="one array a layer" if array.pieces else "")
        for array in description.arrays
    )
    path = str(checkpoint.path)
    return dataclasses.replace(description, path=path, format="orbax", arrays=arrays)


def _published(checkpoint: published.PublishedCheckpoint) -> Description:
    shapes = configs.param_shapes(checkpoint.config)
    arrays = []
    for name, stored in checkpoint.params.items():
        nbytes = math.prod(stored.shape) * stored.dtype.itemsize
        arrays.append(StoredArray(name, shapes[name], stored.dtype.name, nbytes, ""))
    for number in range(len(checkpoint.layers)):
        for name, nbytes in published.expert_bytes(checkpoint, number).items():
            arrays.append(StoredArray(name, shapes[name], "qmoe", nbytes, "one file a layer"))
    return Description(
        path=str(checkpoint.path),
        format=published.FORMAT,
        config=checkpoint.config,
        step=None,
        nbytes=checkpoint.nbytes,
        arrays=tuple(arrays),
    )
