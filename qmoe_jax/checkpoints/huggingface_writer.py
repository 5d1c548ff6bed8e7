# SPDX-License-Identifier: Apache-2.0
"""Writes Switch Transformers in the form that Hugging Face transformers loads.

What a file holds follows from the model's sizes, so every header is written first and the tensors
after it, expert group by expert group: memory holds one group, whatever the model's size.
"""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from qmoe_jax.checkpoints import array_files, huggingface, safetensors, source
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import STACKS, Shape, SwitchConfig

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_NO_DROPS = 1 << 20  # tokens an expert takes of one sequence: more than any sequence has


def save(
    folder: str | os.PathLike[str],
    checkpoint: Source,
    dtype: Literal["float32", "bfloat16"],
    *,
    max_shard_bytes: int = 5 << 30,
) -> pathlib.Path:
    """Writes `config.json` and safetensors files, experts dequantized; all of it or nothing.

    Args:
      folder: a local folder that does not exist yet.
      checkpoint: from `source.open_source`.
      dtype: of all tensors.
      max_shard_bytes: size of a file's tensors; one that is larger has a file of its own. Several
        files get an index.

    Returns:
      The folder.

    Raises:
      CheckpointError: the folder exists or cannot be written; transformers has no class for such a
        model; the source is damaged. Nothing remains of a folder that was not finished.
      ValueError: an argument is out of its range.
    """
    if dtype not in _DTYPES or max_shard_bytes < 1:
        raise ValueError(
            f"expected dtype float32 or bfloat16 and max_shard_bytes >= 1, got {dtype!r} and "
            f"{max_shard_bytes}"
        )
    settings = _settings(checkpoint, dtype)
    with array_files.new_folder(folder) as temporary:
        _write_json(temporary / "config.json", settings)
        _write_weights(temporary, checkpoint, _DTYPES[dtype], max_shard_bytes)
    return pathlib.Path(folder).absolute()


def check(checkpoint: Source) -> None:
    """Checks that transformers has a class for the model.

    Raises:
      CheckpointError: gated experts, or a pattern of layers that it cannot express.
    """
    _settings(checkpoint, "float32")


def nbytes(config: SwitchConfig, dtype: Literal["float32", "bfloat16"]) -> int:
    """Bytes of all tensors that `save` writes."""
    return _DTYPES[dtype].itemsize * sum(math.prod(shape) for _, shape in _planned(config))


def _settings(checkpoint: Source, dtype: str) -> dict[str, Any]:
    """The `config.json`: sizes, and the constants by which transformers computes what T5X does."""
    config = checkpoint.config
    if len(config.mlp_activations) > 1:
        raise CheckpointError(
            f"{checkpoint.path} is a model with gated experts, which Hugging Face transformers has "
            "no class for: export it to T5X's layout instead."
        )
    if config.mlp_dim != config.expert_mlp_dim:
        raise CheckpointError(
            f"the dense MLPs of {checkpoint.path} are {config.mlp_dim} wide and its experts "
            f"{config.expert_mlp_dim}, where Hugging Face transformers has one width for both."
        )
    sparse = {}
    for stack in STACKS:
        layers, depth = configs.sparse_layers(config, stack), configs.num_layers(config, stack)
        sparse[stack] = len(layers)
        if layers != _sparse_in_transformers(depth, len(layers)):
            raise CheckpointError(
                f"the {stack} of {checkpoint.path} has experts in the layers {layers} of {depth}, "
                "a pattern that Hugging Face transformers cannot express."
            )
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": huggingface.MODEL_TYPE,
        "torch_dtype": dtype,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.logits_via_embedding,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_sparse_encoder_layers": sparse["encoder"],
        "num_sparse_decoder_layers": sparse["decoder"],
        "num_experts": config.num_experts,
        "expert_capacity": _NO_DROPS,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "router_jitter_noise": 0.0,
        "relative_attention_num_buckets": config.relpos_num_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": huggingface.LAYER_NORM_EPSILON,
        "dropout_rate": config.dropout_rate,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _sparse_in_transformers(depth: int, count: int) -> tuple[int, ...]:
    """The sparse layers of a stack with these settings (SwitchTransformersStack.__init__)."""
    step = depth // count if count else depth
    return tuple(layer for layer in range(depth) if step == 1 or layer % step == 1)


def _write_weights(
    folder: pathlib.Path, checkpoint: Source, dtype: np.dtype, max_shard_bytes: int
) -> None:
    shards = _plan(checkpoint.config, dtype, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    tensors = _tensors(checkpoint)
    for name, shapes in zip(names, shards, strict=True):
        with safetensors.create(folder / name, shapes, dtype) as write:
            for expected in shapes:
                found, array = next(tensors)
                assert found == expected, f"{found}, planned was {expected}"
                write(found, array)
    if len(shards) > 1:
        files = {key: name for name, shapes in zip(names, shards, strict=True) for key in shapes}
        total = sum(math.prod(shape) for shapes in shards for shape in shapes.values())
        index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": files}
        _write_json(folder / "model.safetensors.index.json", index)


def _plan(config: SwitchConfig, dtype: np.dtype, max_shard_bytes: int) -> list[dict[str, Shape]]:
    """Names and shapes of each file's tensors, in the order of `_tensors`."""
    shards: list[dict[str, Shape]] = [{}]
    room = max_shard_bytes
    for name, shape in _planned(config):
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = shape
        room -= nbytes
    return shards


def _planned(config: SwitchConfig) -> Iterator[tuple[str, Shape]]:
    shapes = configs.param_shapes(config)
    for path in itertools.chain(*source.dense_reads(config)):
        for name in _hf_names(path):
            yield name, shapes[path][::-1] if huggingface.is_transposed(path) else shapes[path]
    for (stack, layer), expert in itertools.product(
        configs.sparse_places(config), range(config.num_experts)
    ):
        for matrix in configs.expert_matrices(config):
            path = f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel"
            yield huggingface.hf_name(path).format(expert), shapes[path][:0:-1]


def _tensors(checkpoint: Source) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """All tensors by their names in transformers, in the order of `_planned`."""
    for arrays in source.dense_arrays(checkpoint):
        for path, array in arrays.items():
            for name in _hf_names(path):
                yield name, array.T if huggingface.is_transposed(path) else array
    for prefix, group in source.expert_arrays(checkpoint):
        for at in range(group.stop - group.start):
            for matrix in configs.expert_matrices(checkpoint.config):
                name = huggingface.hf_name(f"{prefix}/{matrix}/kernel")
                yield name.format(group.start + at), group.arrays[matrix][at].T


def _hf_names(path: str) -> tuple[str, ...]:
    """The embedding is written three times: some versions of transformers do not share it."""
    name = huggingface.hf_name(path)
    return huggingface.EMBEDDINGS if name == huggingface.EMBEDDINGS[0] else (name,)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    array_files.write_text(path, json.dumps(value, indent=2) + "\n")
