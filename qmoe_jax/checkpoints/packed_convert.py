# SPDX-License-Identifier: Apache-2.0
"""A packed store in another codec of ternary experts: the same weights, group by group."""

import dataclasses
import pathlib
from collections.abc import Callable

from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import packed
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.codec import packing
from qmoe_jax.models import config as configs

_WEIGHTS = 1 << 27  # that are unpacked at a time, at about 6 bytes each


def check(store: PackedCheckpoint) -> None:
    """Checks that the store's experts are ternary.

    Raises:
      CheckpointError: they are not.
    """
    if store.header.codec not in packing.CODECS:
        raise CheckpointError(
            f"{store.path} is of codec {store.header.codec!r}, expected one of {packing.CODECS}: "
            "only ternary experts have more than one codec"
        )


def convert(
    store: PackedCheckpoint,
    output_dir: pathlib.Path,
    codec: packing.Codec,
    *,
    committed: Callable[[str, bool], None] = lambda where, layer_done: None,
) -> PackedCheckpoint:
    """Writes the store anew; without loss, so that converting back gives the same array files.

    Memory holds one group of experts, packed, and the trits of 2**27 weights.

    Args:
      store: that passes `check`.
      output_dir: a new or empty folder.
      codec: of the new store.
      committed: called after each file with what was written, and whether it completes a layer's
        experts.

    Raises:
      CheckpointError: the store is damaged, or the new one cannot be written.
    """
    check(store)
    packed.create(output_dir, dataclasses.replace(store.header, codec=codec))
    for name in dict.fromkeys(file.name for file in store.params.values()):
        arrays = packed.read_params(store, list(store.files[name].arrays))
        short = name.removeprefix("params/").removesuffix(".bin")
        packed.commit_params(output_dir, short, arrays)
        committed(short, False)
    config = store.header.config
    for stack, layer in configs.sparse_places(config):
        groups = store.groups[stack, layer]
        where = f"{stack} block {layer + 1}, {config.num_experts} experts"
        for group in groups:
            experts = {
                name: _repacked(record, codec)
                for name, record in packed.read_group(store, group).items()
                if isinstance(record, PackedExperts)
            }
            packed.commit_experts(output_dir, stack, layer, group.start, experts)
            committed(where, group is groups[-1])
    return packed.finish(output_dir)


def _repacked(record: PackedExperts, codec: packing.Codec) -> PackedExperts:
    experts, rows, columns = record.shape
    step = max(1, _WEIGHTS // (rows * columns))
    parts = []
    for first in range(0, experts, step):
        part = packed_lib.expert_slice(record, first, min(step, experts - first))
        # Padded, so that groups of one shape share a compiled program.
        words = 1 << (part.codes.shape[1] - 1).bit_length()
        trits = packing.unpack_ternary(packed_lib.join([part], slab_words=words))
        parts.append(packing.pack_ternary(trits, part.row_values, codec))
    return packed_lib.join(parts)
