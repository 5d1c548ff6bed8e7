# SPDX-License-Identifier: Apache-2.0
"""Reads Switch Transformers saved by Hugging Face transformers, under T5X's names and axes.

A folder holds `config.json` and the weights: `model.safetensors`, or `pytorch_model.bin` of torch,
or several such files and an index. Names: transformers' conversion script
`convert_switch_transformers_original_flax_checkpoint_to_pytorch.py`; kernels and position biases
are stored transposed, experts apart. Opening reads headers alone.
"""

import collections
import dataclasses
import difflib
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from qmoe_jax.checkpoints import safetensors, torch_pickle
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.t5x_experts import ExpertGroup
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack, SwitchConfig

MODEL_TYPE = "switch_transformers"
LAYER_NORM_EPSILON = 1e-6  # that of T5X, and of `models.layers`
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_LOGITS = "lm_head.weight"
_CONVERTED_LOGITS = "decoder.lm_head.weight"  # so the conversion script named it, if untied
_FLOATS = [np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)]
_MAX_JSON = 1 << 26  # bytes
_FILE = re.compile(r"\w[\w.-]{,254}", re.ASCII)
_T5X_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts\.expert_)(\d{1,7})(\..+)")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weights file; `read` returns it, in its own orientation."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class HfCheckpoint:
    """An opened folder: of its weights, only the headers have been read."""

    path: pathlib.Path
    config: SwitchConfig
    params: Mapping[str, tuple[StoredTensor, ...]]  # by T5X path; of experts one tensor each

    @property
    def nbytes(self) -> int:
        """Of all parameters as stored, copies of one left out."""
        tensors = [tensor for stored in self.params.values() for tensor in stored]
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)


def _names_in_block(stack: Stack) -> dict[str, str]:
    """Path below T5X's layer -> name below transformers' block; `{}` is the expert's index."""
    names = {}
    modules = ("SelfAttention", "EncDecAttention")
    for at, (attention, norm) in enumerate(configs.ATTENTIONS[stack]):
        names[f"{norm}/scale"] = f"layer.{at}.layer_norm.weight"
        for name, letter in {"query": "q", "key": "k", "value": "v", "out": "o"}.items():
            names[f"{attention}/{name}/kernel"] = f"layer.{at}.{modules[at]}.{letter}.weight"
    mlp = f"layer.{len(configs.ATTENTIONS[stack])}"
    names["pre_mlp_layer_norm/scale"] = f"{mlp}.layer_norm.weight"
    names["mlp/router/router_weights/w/kernel"] = f"{mlp}.mlp.router.classifier.weight"
    for name in ("wi", "wo"):
        names[f"mlp/{name}/kernel"] = f"{mlp}.mlp.{name}.weight"
        names[f"mlp/expert/{name}/kernel"] = f"{mlp}.mlp.experts.expert_{{}}.{name}.weight"
    return names


def _names_outside() -> dict[str, str]:
    names = {"token_embedder/embedding": EMBEDDINGS[0], "decoder/logits_dense/kernel": _LOGITS}
    for stack in configs.STACKS:
        attention = f"{stack}.block.0.layer.0.SelfAttention"
        names[f"{stack}/relpos_bias/rel_embedding"] = f"{attention}.relative_attention_bias.weight"
        names[f"{stack}/{stack}_norm/scale"] = f"{stack}.final_layer_norm.weight"
    return names


_IN_BLOCK = {stack: _names_in_block(stack) for stack in configs.STACKS}
_OUTSIDE = _names_outside()
_IN_LAYER = {stack: {new: old for old, new in _IN_BLOCK[stack].items()} for stack in _IN_BLOCK}
_BY_HF_NAME = {new: old for old, new in _OUTSIDE.items()}


def hf_name(path: str) -> str:
    """What transformers calls a T5X parameter; in that of experts, `{}` stands for the index."""
    match = _T5X_LAYER.fullmatch(path)
    if match is None:
        return _OUTSIDE[path]
    return f"{match[1]}.block.{match[2]}.{_IN_BLOCK[match[1]][match[3]]}"


def is_transposed(path: str) -> bool:
    """Whether transformers stores a T5X parameter, or each of its experts, transposed."""
    return path.endswith(("/kernel", "/rel_embedding"))


def is_huggingface(folder: pathlib.Path) -> bool:
    """Whether transformers saved it: weights under its names, or a Switch's `config.json`."""
    if any((folder / f"{name}{end}").exists() for name in _WEIGHTS for end in ("", _INDEX)):
        return True  # of another model, `open_checkpoint` says so
    try:
        found = _read_json(folder / "config.json")
    except CheckpointError:
        return False
    return found.get("model_type") == MODEL_TYPE


def open_checkpoint(folder: pathlib.Path) -> HfCheckpoint:
    """Reads the configuration, and the headers of all weights files.

    Args:
      folder: a local folder as `save_pretrained` writes it.

    Raises:
      CheckpointError: a file is missing or damaged; the model computes what T5X's Switch
        Transformers do not; a tensor is missing, left over, or of another shape than others imply.
    """
    settings = read_settings(folder)
    params = named_as_t5x(folder, settings, _open_weights(folder))
    try:
        config = configs.config_from_shapes({path: _shape(params, path) for path in params})
    except ValueError as error:
        raise CheckpointError(f"{folder}, its tensors named as in T5X: {error}") from error
    distance = settings.get("relative_attention_max_distance", config.relpos_max_distance)
    return HfCheckpoint(folder, dataclasses.replace(config, relpos_max_distance=distance), params)


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
      CheckpointError: it is missing or damaged, or the model computes what T5X's do not.
    """
    settings = _read_json(folder / "config.json")
    _check_settings(folder, settings)
    return settings


def named_as_t5x(
    folder: pathlib.Path, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, ...]]:
    """The tensors of a folder by T5X path, copies of one left out; of experts one tensor each.

    Raises:
      CheckpointError: an expert is missing, or a tensor holds no floats.
    """
    kept = _without_copies(tensors, settings.get("tie_word_embeddings", True))
    params = _by_path(folder, kept)
    for path, stored in params.items():
        if any(tensor.dtype not in _FLOATS for tensor in stored):
            raise CheckpointError(
                f"`{path}` of {folder} is {stored[0].dtype.name}; expected float32, float16 or "
                "bfloat16: give the model as it was before it was quantized."
            )
    return params


def read(checkpoint: HfCheckpoint, names: Sequence[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Parameters by their T5X paths, with T5X's axes, in the stored dtype; fresh arrays.

    Raises:
      CheckpointError: unknown name; a file has been damaged since it was opened.
    """
    values = {}
    for name in names:
        stored = _find(checkpoint, name)
        if _is_experts(name):
            values[name] = _read_experts(stored, 0, len(stored))
        else:
            array = stored[0].read()
            values[name] = np.ascontiguousarray(array.T) if is_transposed(name) else array
    return values


def expert_groups(
    checkpoint: HfCheckpoint, stack: Stack, layer: int, group_size: int, start: int = 0
) -> Generator[ExpertGroup, None, None]:
    """Yields a layer's experts from `start` on, at most `group_size` at a time, `[group, in, out]`.

    Raises:
      CheckpointError: the layer has no experts; a file has been damaged since it was opened.
      ValueError: `group_size` is below 1.
    """
    if group_size < 1:
        raise ValueError(f"expected group_size >= 1, got {group_size}")
    prefix, count = f"{stack}/layers_{layer}/mlp/expert", checkpoint.config.num_experts
    matrices = configs.expert_matrices(checkpoint.config)
    stored = {name: _find(checkpoint, f"{prefix}/{name}/kernel") for name in matrices}
    for first in range(start, count, group_size):
        stop = min(first + group_size, count)
        # Not bound here: the caller alone holds a group, and can free it before the next.
        yield ExpertGroup(
            first, stop, {name: _read_experts(stored[name], first, stop) for name in matrices}
        )


def _read_experts(stored: Sequence[StoredTensor], start: int, stop: int) -> np.ndarray:
    experts = np.empty((stop - start, *stored[0].shape[::-1]), stored[0].dtype)
    for into, tensor in zip(experts, stored[start:stop], strict=True):
        into[...] = tensor.read().T
    return experts


def _find(checkpoint: HfCheckpoint, name: str) -> tuple[StoredTensor, ...]:
    if name in checkpoint.params:
        return checkpoint.params[name]
    near = difflib.get_close_matches(name, checkpoint.params, n=1, cutoff=0.0)
    raise CheckpointError(f"{checkpoint.path} has no parameter `{name}`. Did you mean `{near[0]}`?")


def _is_experts(path: str) -> bool:
    return "/mlp/expert/" in path


def _shape(params: Mapping[str, tuple[StoredTensor, ...]], path: str) -> tuple[int, ...]:
    """A parameter's shape in T5X."""
    shape = params[path][0].shape
    shape = shape[::-1] if is_transposed(path) else shape
    return (len(params[path]), *shape) if _is_experts(path) else shape


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_JSON)
        found = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}): copy or download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy or download it again.")
    return found


def _check_settings(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Refuses what would change the results and shows in no shape."""
    expected = {
        "model_type": (MODEL_TYPE, None),
        "feed_forward_proj": ("relu", "relu"),  # what it may be, and what transformers takes it for
        "layer_norm_epsilon": (LAYER_NORM_EPSILON, LAYER_NORM_EPSILON),
    }
    for name, (wanted, default) in expected.items():
        if (value := settings.get(name, default)) != wanted:
            raise CheckpointError(
                f"{folder}/config.json says `{name}` is {str(value)[:100]}; expected {wanted}: "
                "only Switch Transformers as T5X trains them can be read."
            )
    distance = settings.get("relative_attention_max_distance", 128)
    tied = settings.get("tie_word_embeddings", True)
    if type(distance) is not int or not 0 < distance < 2**31 or type(tied) is not bool:
        raise CheckpointError(
            f"{folder}/config.json says `relative_attention_max_distance` is "
            f"{str(distance)[:100]} and `tie_word_embeddings` {str(tied)[:100]}; expected a "
            "positive integer, and true or false: copy or download it again."
        )


def _open_weights(folder: pathlib.Path) -> dict[str, StoredTensor]:
    for name in _WEIGHTS:
        if (folder / name).exists():
            return open_file(folder / name)
        index = folder / f"{name}{_INDEX}"
        if index.exists():
            return _open_shards(index)
    raise CheckpointError(
        f"{folder} has a config.json but no weights: expected one of {', '.join(_WEIGHTS)}, or "
        "several files and an index (`model.safetensors.index.json`)."
    )


def _open_shards(index: pathlib.Path) -> dict[str, StoredTensor]:
    """All tensors that an index names; every file of it must be there now, not in hours."""
    shards = _read_json(index).get("weight_map")
    by_file: dict[str, list[str]] = collections.defaultdict(list)
    for name, file in shards.items() if isinstance(shards, dict) else ():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise CheckpointError(f"{index} says that `{name}` is in {str(file)[:100]!r}: no file.")
        by_file[file].append(name)
    if not by_file:
        raise CheckpointError(f"{index} has no `weight_map`: copy or download it again.")
    tensors = {}
    for file, names in by_file.items():
        if not (index.parent / file).exists():
            raise CheckpointError(
                f"{index} names the file {file}, which is not there: copy or download it too."
            )
        found = open_file(index.parent / file)
        for name in names:
            if name not in found:
                raise CheckpointError(
                    f"{index} says that `{name}` is in {file}, which does not hold it: the files "
                    "are of different models, copy or download all of them again."
                )
            tensors[name] = found[name]
    return tensors


def open_file(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one weights file, of safetensors or torch, by their names.

    Raises:
      CheckpointError: it is missing or damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return {
            name: StoredTensor(
                tensor.dtype, tensor.shape, functools.partial(safetensors.read_tensor, tensor)
            )
            for name, tensor in safetensors.read_header(path).items()
        }
    archive = torch_pickle.open_archive(path)
    found, tensors = torch_pickle.read_object(archive), {}
    for name, ref in found.items() if isinstance(found, dict) else [("", found)]:
        if not isinstance(name, str) or not isinstance(ref, torch_pickle.TensorRef):
            raise CheckpointError(
                f"{path} holds no dict of tensors alone: save the model's `state_dict()`."
            )
        read_ref = functools.partial(torch_pickle.read_tensor, archive, ref)
        tensors[name] = StoredTensor(ref.dtype, ref.shape, read_ref)
    return tensors


def _without_copies(tensors: Mapping[str, StoredTensor], tied: bool) -> dict[str, StoredTensor]:
    """One tensor for the embedding, and one for the logits only where they have their own."""
    kept = dict(tensors)
    embeddings = [kept.pop(name) for name in EMBEDDINGS if name in kept]
    logits, converted = kept.pop(_LOGITS, None), kept.pop(_CONVERTED_LOGITS, None)
    if embeddings:
        kept[EMBEDDINGS[0]] = embeddings[0]
    if converted is not None:  # whatever the configuration says: the script writes no copy
        kept[_LOGITS] = converted
    elif logits is not None and not tied:
        kept[_LOGITS] = logits
    return kept


def _by_path(
    folder: pathlib.Path, tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, ...]]:
    """The tensors by T5X path; a name that transformers' Switch does not have stays as it is."""
    params: dict[str, tuple[StoredTensor, ...]] = {}
    experts: dict[str, dict[int, StoredTensor]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        path = _t5x_path(f"{match[1]}{{}}{match[3]}" if match else name)
        if match and _is_experts(path):
            experts[path][int(match[2])] = tensor
        else:
            params[path] = (tensor,)
    for path, found in experts.items():
        first = next(iter(found.values()))
        for index in range(len(found)):
            tensor = found.get(index)
            if tensor is None or (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"`{hf_name(path).format(index)}` of {folder} is missing, or unlike the "
                    "layer's other experts in shape or dtype: copy or download the model again."
                )
        params[path] = tuple(found[index] for index in range(len(found)))
    return params


def _t5x_path(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    if name in _BY_HF_NAME or match is None or match[3] not in _IN_LAYER[match[1]]:
        return _BY_HF_NAME.get(name, name)
    return f"{match[1]}/layers_{match[2]}/{_IN_LAYER[match[1]][match[3]]}"
