# SPDX-License-Identifier: Apache-2.0
"""Reads packs that the QMoE authors published (IST-DASLab/qmoe: sub1.py).

    config.json      that of transformers; `is_full_sparse` where every layer has experts
    noexp.pt         all that is not an expert's, under transformers' names
    exp00.pt ...     one for each sparse layer, encoder first: words, row offsets and row values of
                     each expert's `wi` and `wo` (`codec.packing.PublishedMatrix`)
    sizes.pt         the number of words of each matrix

All `.pt` are torch's.
"""

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import huggingface, torch_pickle
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.huggingface import StoredTensor
from qmoe_jax.checkpoints.torch_pickle import Archive, TensorRef
from qmoe_jax.codec import packing
from qmoe_jax.codec.packing import PublishedMatrix
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack, SwitchConfig

FORMAT = "published"

PARAMS, SIZES = "noexp.pt", "sizes.pt"
_AGAIN = "copy or download it again."
_MATRICES = ("wi", "wo")
_MAX_SIZE = 2**31


@dataclasses.dataclass(frozen=True)
class PublishedCheckpoint:
    """An opened pack: of its tensors none has been read."""

    path: pathlib.Path
    config: SwitchConfig
    params: Mapping[str, StoredTensor]  # what is no expert's, by T5X path
    sizes: Mapping[str, int]  # words, by `...expert_3.wi`
    nbytes: int  # of all files of tensors

    @property
    def layers(self) -> tuple[tuple[Stack, int], ...]:
        """The sparse layers, in the order of their files."""
        return configs.sparse_places(self.config)


def is_published(folder: pathlib.Path) -> bool:
    """Whether `folder` looks like a pack of the published code."""
    return (folder / PARAMS).exists()


def open_checkpoint(folder: pathlib.Path) -> PublishedCheckpoint:
    """Reads configuration, sizes and the list of parameters; all files must be there.

    Raises:
      CheckpointError: a file is missing, left over or damaged; the model is none that T5X has, or
        the files do not belong together.
    """
    settings = huggingface.read_settings(folder)
    tensors = huggingface.open_file(folder / PARAMS)
    params = huggingface.named_as_t5x(folder, settings, tensors)
    config = _config(folder, settings, {path: stored[0] for path, stored in params.items()})
    files = [folder / PARAMS, folder / SIZES]
    checkpoint = PublishedCheckpoint(
        path=folder,
        config=config,
        params={path: stored[0] for path, stored in params.items()},
        sizes=_read_sizes(folder / SIZES),
        nbytes=0,
    )
    files += _layer_files(checkpoint)
    _check_sizes(checkpoint)
    nbytes = sum(file.stat().st_size for file in files)
    return dataclasses.replace(checkpoint, nbytes=nbytes)


def check_layers(checkpoint: PublishedCheckpoint) -> None:
    """Checks the list of tensors of every layer's file, so that a bad one shows now.

    Raises:
      CheckpointError: a file is damaged, or its tensors are not those of its layer.
    """
    for number in range(len(checkpoint.layers)):
        _open_layer(checkpoint, number)


def read_params(
    checkpoint: PublishedCheckpoint, prefix: str
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The parameters below a layer's path, or (of no prefix) outside of layers, with T5X's axes.

    Raises:
      CheckpointError: a tensor is damaged.
    """
    values = {}
    for path, stored in checkpoint.params.items():
        if path.startswith(prefix) and (prefix or "/layers_" not in path):
            array = stored.read()
            values[path] = array.T if huggingface.is_transposed(path) else array
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"{checkpoint.path / PARAMS}: `{huggingface.hf_name(path)}` holds NaN or "
                    f"infinity: {_AGAIN}"
                )
    return values


def read_groups(
    checkpoint: PublishedCheckpoint, number: int, experts_per_group: int
) -> Iterator[tuple[int, dict[str, PackedExperts]]]:
    """Yields first expert and packed matrices, group by group, of the sparse layer `number`.

    Raises:
      CheckpointError: the layer's file is damaged.
    """
    archive, refs = _open_layer(checkpoint, number)
    count = checkpoint.config.num_experts
    for start in range(0, count, experts_per_group):
        part = range(start, min(start + experts_per_group, count))
        yield (
            start,
            {
                matrix: packed_lib.join(
                    _read_matrix(checkpoint, archive, refs, number, expert, matrix)
                    for expert in part
                )
                for matrix in _MATRICES
            },
        )


def expert_bytes(checkpoint: PublishedCheckpoint, number: int) -> dict[str, int]:
    """Stored bytes of the matrices of the sparse layer `number`, all experts', by T5X path."""
    stack, layer = checkpoint.layers[number]
    found = {}
    for matrix in _MATRICES:
        rows, _ = _matrix_shape(checkpoint.config, matrix)
        experts = range(checkpoint.config.num_experts)
        words = sum(checkpoint.sizes[_name(stack, layer, e, matrix)] for e in experts)
        offsets_and_values = 4 * (rows + 1) + 2 * 2 * rows
        path = f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel"
        found[path] = 2 * words + len(experts) * offsets_and_values
    return found


def _config(
    folder: pathlib.Path, settings: Mapping[str, Any], params: Mapping[str, StoredTensor]
) -> SwitchConfig:
    """All sizes but `d_ff` are those of the parameters; the experts are the routers' outputs."""
    shapes = {
        path: stored.shape[::-1] if huggingface.is_transposed(path) else stored.shape
        for path, stored in params.items()
    }
    d_ff = settings.get("d_ff")
    if type(d_ff) is not int or not 0 < d_ff < _MAX_SIZE:
        raise CheckpointError(
            f"{folder}/config.json says `d_ff` is {str(d_ff)[:100]}; expected a width: {_AGAIN}"
        )
    routers = [path for path in shapes if path.endswith("/router/router_weights/w/kernel")]
    for path in routers:
        width, experts = (*shapes[path], 0, 0)[:2]
        prefix = path.removesuffix("router/router_weights/w/kernel")
        shapes[f"{prefix}expert/wi/kernel"] = (experts, width, d_ff)
        shapes[f"{prefix}expert/wo/kernel"] = (experts, d_ff, width)
    try:
        config = configs.config_from_shapes(shapes)
    except ValueError as error:
        raise CheckpointError(
            f"{folder / PARAMS}, its tensors named as in T5X: {str(error).rstrip('.')}: {_AGAIN}"
        ) from error
    expected = {
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_experts": config.num_experts,
    }
    depth = config.num_encoder_layers + config.num_decoder_layers
    for name, found in expected.items():
        if settings.get(name, found) != found:
            raise CheckpointError(
                f"{folder}/config.json says `{name}` is {str(settings[name])[:100]}, but "
                f"{PARAMS} is of {found}: copy or download both again."
            )
    if settings.get("is_full_sparse") and len(routers) != depth:
        raise CheckpointError(
            f"{folder}/config.json says that every layer has experts (`is_full_sparse`), but "
            f"{PARAMS} has routers for {len(routers)} of {depth}: copy or download both again."
        )
    distance = settings.get("relative_attention_max_distance", config.relpos_max_distance)
    return dataclasses.replace(config, relpos_max_distance=distance)


def _read_sizes(path: pathlib.Path) -> dict[str, int]:
    found = torch_pickle.read_object(torch_pickle.open_archive(path))
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and type(size) is int and 0 < size < _MAX_SIZE
        for name, size in found.items()
    ):
        raise CheckpointError(f"{path} is no list of word counts by matrix: {_AGAIN}")
    return found


def _check_sizes(checkpoint: PublishedCheckpoint) -> None:
    experts = range(checkpoint.config.num_experts)
    layers = checkpoint.layers
    expected = {
        _name(*layer, e, matrix) for layer in layers for e in experts for matrix in _MATRICES
    }
    if different := expected ^ checkpoint.sizes.keys():
        name = min(different)
        what = "lacks" if name in expected else "has"
        raise CheckpointError(
            f"{checkpoint.path / SIZES} {what} `{name[:200]}`, unlike {PARAMS}: copy or download "
            "both again."
        )


def _layer_files(checkpoint: PublishedCheckpoint) -> list[pathlib.Path]:
    """The files of the sparse layers: exactly those that there should be."""
    folder = checkpoint.path
    expected = [folder / _file(number) for number in range(len(checkpoint.layers))]
    there = {path for path in folder.iterdir() if re.fullmatch(r"exp\d+\.pt", path.name)}
    for path in (*expected, *sorted(there)):
        if path not in there or path not in expected:
            what = "is missing" if path not in there else "is one too many"
            raise CheckpointError(
                f"{path} {what}: by {PARAMS} there are {len(expected)} layers with experts, "
                f"{_file(0)} to {_file(len(expected) - 1)}; copy or download the pack again."
            )
    return expected


def _open_layer(
    checkpoint: PublishedCheckpoint, number: int
) -> tuple[Archive, dict[str, TensorRef]]:
    """The file of the sparse layer `number` and its tensors, by name; each is as expected."""
    path = checkpoint.path / _file(number)
    archive = torch_pickle.open_archive(path)
    refs = torch_pickle.read_object(archive)
    if not isinstance(refs, dict):
        raise CheckpointError(f"{path} holds no dict of tensors: {_AGAIN}")
    (stack, layer), expected = checkpoint.layers[number], _expected(checkpoint, number)
    if unknown := refs.keys() - expected.keys():
        raise CheckpointError(
            f"{path} holds `{min(map(str, unknown))[:200]}`, which is not of {stack} block "
            f"{layer + 1}: {_AGAIN}"
        )
    for name, (dtype, shape) in expected.items():
        ref = refs.get(name)
        if isinstance(ref, TensorRef) and (ref.dtype, ref.shape) == (dtype, shape):
            continue
        if ref is None and shape == (0,):  # `weight`, a placeholder for transformers
            continue
        found = f"{ref.dtype.name} {ref.shape}" if isinstance(ref, TensorRef) else "no tensor"
        why = " (sizes.pt)" if name.endswith(".w_comp") else " (config.json)"
        raise CheckpointError(
            f"{path}: `{name}`: expected {dtype.name} {shape}{why}, found {found}: copy or "
            "download the pack again."
        )
    return archive, refs


def _expected(
    checkpoint: PublishedCheckpoint, number: int
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a layer's file."""
    bfloat16, kinds = np.dtype(ml_dtypes.bfloat16), {}
    for expert in range(checkpoint.config.num_experts):
        for matrix in _MATRICES:
            name = _name(*checkpoint.layers[number], expert, matrix)
            rows, _ = _matrix_shape(checkpoint.config, matrix)
            kinds[f"{name}.w_comp"] = (np.dtype(np.int16), (checkpoint.sizes[name],))
            kinds[f"{name}.row_off"] = (np.dtype(np.int32), (rows + 1,))
            kinds[f"{name}.ter_minmax"] = (bfloat16, (2 * rows,))
            kinds[f"{name}.weight"] = (bfloat16, (0,))
    return kinds


def _read_matrix(
    checkpoint: PublishedCheckpoint,
    archive: Archive,
    refs: Mapping[str, TensorRef],
    number: int,
    expert: int,
    matrix: str,
) -> PackedExperts:
    name = _name(*checkpoint.layers[number], expert, matrix)
    w_comp, row_off, ter_minmax = (
        _read_tensor(archive, f"{name}.{key}", refs[f"{name}.{key}"])
        for key in ("w_comp", "row_off", "ter_minmax")
    )
    _, columns = _matrix_shape(checkpoint.config, matrix)
    try:
        published = PublishedMatrix(w_comp.view(np.uint16), row_off, ter_minmax)
        return packing.from_published(published, columns)
    except ValueError as error:
        raise CheckpointError(f"{archive.path}: `{name}`: {error}: {_AGAIN}") from error


def _read_tensor(archive: Archive, name: str, ref: TensorRef) -> Shaped[np.ndarray, "..."]:
    """A tensor, with its checksum: a wrong word of the right length would show nowhere else."""
    array, entry = torch_pickle.read_tensor(archive, ref), archive.storages[ref.storage]
    if array.nbytes == entry.file_size and zlib.crc32(array.tobytes()) != entry.CRC:
        raise CheckpointError(f"{archive.path}: `{name}` does not match its checksum: {_AGAIN}")
    return array


def _matrix_shape(config: SwitchConfig, matrix: str) -> tuple[int, int]:
    """Rows (out) and columns (in)."""
    D, F = config.emb_dim, config.expert_mlp_dim
    return (F, D) if matrix == "wi" else (D, F)


def _name(stack: Stack, layer: int, expert: int, matrix: str) -> str:
    path = f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel"
    return huggingface.hf_name(path).format(expert).removesuffix(".weight")


def _file(number: int) -> str:
    return f"exp{number:02d}.pt"
