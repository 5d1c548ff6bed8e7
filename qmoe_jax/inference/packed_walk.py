# SPDX-License-Identifier: Apache-2.0
"""Packed experts in a walk over the blocks: a group's tokens, out of a buffer and back into it.

What `calibration/experts.py` does with dense matrices, by `packed_experts`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import packed as packed_lib
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import PackedExperts
from qmoe_jax.calibration import experts
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.experts import Assignment, Piece
from qmoe_jax.calibration.walk import Params, Routes
from qmoe_jax.checkpoints.packed import Experts
from qmoe_jax.codec import packing
from qmoe_jax.inference.packed_experts import COLLECTION, packed_experts
from qmoe_jax.models.block import Block
from qmoe_jax.models.layers import rms_norm

PIECE, TAIL = 4096, 512  # tokens of one call


def prepare(group: Mapping[str, Experts]) -> dict[str, Any]:
    """A group as `packed_experts` takes it, still on the host.

    Words are padded to a power of two, so that groups of one shape share a compiled program.
    """
    records: dict[str, Any] = {}
    for name, record in group.items():
        if isinstance(record, PackedExperts):
            words = 1 << (record.codes.shape[1] - 1).bit_length()
            record = packed_lib.join([record], slab_words=words)
            records["entries"] = packing.entries(record.codec)
        records[name] = record
    return records


def run_packed_experts(
    block: Block,
    layer_params: Params,
    records: Mapping[str, Any],
    first: int,
    buffer: TokenBuffer,
    routes: Routes,
    assignment: Assignment,
    *,
    implementation: Implementation = "auto",
) -> None:
    """Adds `prob * expert(norm(x))` to the rows of a group of experts in `buffer`, in place.

    Args:
      block, layer_params: its layer norm makes the experts' inputs.
      records: of the group (`prepare`), on the device.
      first: the group's first expert.
      buffer: the residual stream after the dense part.
      routes: the expert of each row and its probability.
      assignment: the rows of each expert.
      implementation: see `pallas_kernels.implementation.resolve`.
    """
    count = records["wo"].shape[0]
    step = _Step(block.config.mlp_activations, block.dtype, implementation)
    scale_D = layer_params["pre_mlp_layer_norm"]["scale"]
    group_rows = assignment.rows[assignment.starts[first] : assignment.starts[first + count]]

    def pieces() -> Iterator[Piece]:
        for rows, size in experts.chunks(group_rows, PIECE, TAIL):
            index_N = np.full(size, count, np.int32)  # padding belongs to no expert
            index_N[: len(rows)] = routes.expert[rows] - first
            index = jnp.asarray(index_N)
            yield rows, size, functools.partial(_run_piece, step, scale_D, dict(records), index)

    experts.run_pieces(buffer, routes, pieces())


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a compiled step depends on: blocks of both stacks share it."""

    activations: tuple[str, ...]
    dtype: Any
    implementation: Implementation


@functools.partial(jax.jit, static_argnums=0)
def _run_piece(step: _Step, scale_D, records, index_N, x_ND, prob_N):
    y_ND = packed_experts(
        {COLLECTION: records},
        rms_norm(x_ND, scale_D, step.dtype),
        index_N,
        activations=step.activations,
        implementation=step.implementation,
    )
    return experts.add_output(x_ND, y_ND, prob_N)
