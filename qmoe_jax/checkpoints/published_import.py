# SPDX-License-Identifier: Apache-2.0
"""A pack of the published code into our packed store, word for word: the code is the same."""

import math
import pathlib
from collections.abc import Callable

from qmoe_jax.checkpoints import packed, published
from qmoe_jax.checkpoints.packed_manifest import Header, PackedCheckpoint
from qmoe_jax.checkpoints.published import PublishedCheckpoint
from qmoe_jax.models import config as configs

EXPERTS_PER_GROUP = 16  # that of the published code


def import_checkpoint(
    checkpoint: PublishedCheckpoint,
    output_dir: pathlib.Path,
    *,
    experts_per_group: int = EXPERTS_PER_GROUP,
    committed: Callable[[str, bool], None] = lambda where, layer_done: None,
) -> PackedCheckpoint:
    """Writes the packed store.

    Memory holds one group of experts, or the parameters of one layer.

    Args:
      checkpoint: opened; `published.check_layers` tells beforehand of most that can be wrong.
      output_dir: a new or empty folder.
      experts_per_group: 1 or more; stored, and later read, together.
      committed: called after each of `num_commits` with what was written, and whether it completes
        a layer's experts.

    Raises:
      CheckpointError: the pack is damaged, or the store cannot be written.
    """
    config = checkpoint.config
    packed.create(output_dir, _header(checkpoint, experts_per_group))
    packed.commit_params(output_dir, "outer", published.read_params(checkpoint, ""))
    committed("embedding", False)
    for number, (stack, layer) in enumerate(checkpoint.layers):
        where = f"{stack} block {layer + 1}, {config.num_experts} experts"
        for start, experts in published.read_groups(checkpoint, number, experts_per_group):
            packed.commit_experts(output_dir, stack, layer, start, experts)
            committed(where, start + experts_per_group >= config.num_experts)
    for stack in configs.STACKS:
        for layer in range(configs.num_layers(config, stack)):
            own = published.read_params(checkpoint, f"{stack}/layers_{layer}/")
            packed.commit_params(output_dir, f"{stack}.layers_{layer}", own)
            committed(f"{stack} block {layer + 1}", False)
    return packed.finish(output_dir)


def num_commits(checkpoint: PublishedCheckpoint, experts_per_group: int) -> int:
    """How many files `import_checkpoint` writes."""
    config = checkpoint.config
    groups = -(-config.num_experts // experts_per_group)
    layers = sum(configs.num_layers(config, stack) for stack in configs.STACKS)
    return 1 + layers + groups * len(checkpoint.layers)


def _header(checkpoint: PublishedCheckpoint, experts_per_group: int) -> Header:
    config = checkpoint.config
    source = {
        "path": str(checkpoint.path),
        "format": published.FORMAT,
        "step": None,
        "bytes": checkpoint.nbytes,
        "parameters": sum(map(math.prod, configs.param_shapes(config).values())),
        "sparse_layers": len(checkpoint.layers),
        "experts": config.num_experts,
    }
    return Header(config, "qmoe", {"import": {"experts_per_group": experts_per_group}}, source)
