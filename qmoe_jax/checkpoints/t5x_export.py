# SPDX-License-Identifier: Apache-2.0
"""Writes any readable checkpoint as a T5X checkpoint, experts dequantized.

T5X's `eval` and `infer` run what comes out: it is a checkpoint of the classic layout, with a step
and no optimizer state. Memory holds one group of experts, whatever the model's size.
"""

import os
import pathlib
from typing import Literal

from qmoe_jax.checkpoints import source, t5x_msgpack, t5x_writer
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models import config as configs


def save(
    path: str | os.PathLike[str], checkpoint: Source, dtype: Literal["float32", "bfloat16"]
) -> pathlib.Path:
    """Writes `{path}/checkpoint_{step}`, every expert a chunk of its own; all of it or nothing.

    Args:
      path: local directory that holds the steps; made if need be.
      checkpoint: from `source.open_source`; one without a step becomes step 0.
      dtype: of all arrays.

    Returns:
      The checkpoint's directory.

    Raises:
      CheckpointError: the checkpoint exists or cannot be written; the source is damaged.
    """
    shapes = configs.param_shapes(checkpoint.config)
    matrices = configs.expert_matrices(checkpoint.config)
    stored, step = t5x_msgpack.parse_dtype(dtype), checkpoint.step or 0
    with t5x_writer.create(path, step=step, dtype=stored) as writer:
        for arrays in source.dense_arrays(checkpoint):
            for name, array in arrays.items():
                t5x_writer.add(writer, name, array)
        begun = {}  # by the experts' path: how each matrix is written
        for prefix, group in source.expert_arrays(checkpoint):
            if prefix not in begun:
                names = {matrix: f"{prefix}/{matrix}/kernel" for matrix in matrices}
                begun[prefix] = {
                    matrix: t5x_writer.add_experts(writer, name, _three(shapes[name]), stored)
                    for matrix, name in names.items()
                }
            for matrix, write in begun[prefix].items():
                write(group.start, group.arrays[matrix])
    return t5x_writer.checkpoint_path(path, step)


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    experts, columns, rows = shape
    return experts, columns, rows
