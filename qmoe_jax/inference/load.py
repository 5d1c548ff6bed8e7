# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of any readable format to a model that can be applied.

Of a packed checkpoint the experts stay packed, in memory as on disk.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.implementation import Implementation
from qmoe_jax.checkpoints import formats, packed, source
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.codec import packing
from qmoe_jax.inference import sharding
from qmoe_jax.inference.model import Model
from qmoe_jax.inference.packed_experts import COLLECTION, packed_experts
from qmoe_jax.models import config as configs
from qmoe_jax.models.switch import Switch


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = "auto",
    mesh: Mesh | None = None,
) -> Model:
    """Reads a whole model, onto one device or onto the devices of a mesh.

    Args:
      path: a packed checkpoint, a T5X checkpoint (also a URL) or a Hugging Face folder.
      dtype: of the activations; experts stay as they are stored, the rest unless float32 is more.
      implementation: of the products with packed experts.
      mesh: of `sharding.expert_mesh`; its devices share the experts, each has all else. None: one
        device, JAX's default.

    Raises:
      CheckpointError: no checkpoint, or a damaged one.
      ValueError: its parameters are not those of a Switch Transformer; or the experts do not divide
        by the devices.
    """
    if formats.detect(path) == "packed":
        checkpoint = packed.open_checkpoint(pathlib.Path(path))
        if checkpoint.header.codec != "dense":
            return _load_packed(checkpoint, dtype, implementation, mesh)
    # What is kept of chunks that several devices share is at most a layer.
    opened = source.open_source(path, memory_budget=sys.maxsize)
    if mesh is None:
        params, experts = {}, None
        for part in source.param_parts(opened):
            params |= jax.tree.map(jnp.asarray, part)
    else:
        params = sharding.dense_params(opened, mesh)
        experts = sharding.sharded_experts(mesh, opened.config)
    params = _cast_once(params, dtype)
    module = Switch(opened.config, jnp.dtype(dtype), experts)
    return Model(module, {"params": unflatten_dict(params, sep="/")})


def _load_packed(
    checkpoint: PackedCheckpoint,
    dtype: DTypeLike,
    implementation: Implementation,
    mesh: Mesh | None,
) -> Model:
    config = checkpoint.header.config
    if mesh is None:
        experts = functools.partial(
            packed_experts, activations=config.mlp_activations, implementation=implementation
        )
        put = functools.partial(jax.tree.map, jnp.asarray)
    else:
        experts = sharding.sharded_experts(mesh, config, implementation)
        put = functools.partial(sharding.replicated, mesh)
    params: dict[str, Any] = {}
    records: dict[str, Any] = {}
    codec = checkpoint.header.codec
    entries = put(packing.entries(codec)) if codec in packing.CODECS else None
    for name in checkpoint.params:
        params |= _cast_once(put(packed.read_params(checkpoint, [name])), dtype)
    for stack, layer in configs.sparse_places(config):
        below = f"{stack}/layers_{layer}/mlp/expert"
        if mesh is None:
            matrices = put(packed.load_layer(checkpoint, stack, layer))
        else:
            matrices = sharding.packed_layer(checkpoint, stack, layer, mesh)
        records |= {f"{below}/{matrix}": record for matrix, record in matrices.items()}
        if entries is not None:
            records[f"{below}/entries"] = entries
    module = Switch(config, jnp.dtype(dtype), experts)
    variables = {
        "params": unflatten_dict(params, sep="/"),
        COLLECTION: unflatten_dict(records, sep="/"),
    }
    return Model(module, variables)


def _cast_once(params: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
    """Parameters in bfloat16 that a float32 model would cast in every call, and then hold twice.

    But for experts, of which a call needs few. No number changes.
    """
    if jnp.dtype(dtype) != jnp.float32:
        return dict(params)
    return {
        name: array if "/mlp/expert/" in name else array.astype(jnp.float32)
        for name, array in params.items()
    }
