# SPDX-License-Identifier: Apache-2.0
"""One view of every readable checkpoint, for whoever walks a model block by block."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from pallas_kernels import sub1_decode
from pallas_kernels.packed import PackedExperts, UniformExperts
from qmoe_jax.checkpoints import formats, huggingface, packed, t5x, t5x_experts
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.checkpoints.t5x_experts import ChunkRoom, ExpertGroup
from qmoe_jax.codec import packing, uniform
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack, SwitchConfig

_GROUP_BYTES = 256 << 20  # of dense experts at a time


@runtime_checkable  # type hints are checked in the tests
class ExpertGroups(Protocol):
    """The experts of one layer from `start` on, in order, as groups of at most `group_size`.

    A group is dense matrices `[group, in, out]` named `wi`, `wo`, ...; none reaches from one group
    of a packed store into the next.
    """

    def __call__(
        self, stack: Stack, layer: int, group_size: int, start: int = 0
    ) -> Iterator[ExpertGroup]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint; nothing but its index has been read.

    `read(names)` returns parameters by their T5X paths, in the stored dtype.
    """

    path: str
    format: formats.Format  # "t5x", "huggingface" or "packed"
    config: SwitchConfig
    step: int | None
    nbytes: int  # of all parameters as stored
    read: Callable[[Sequence[str]], Mapping[str, Shaped[np.ndarray, "..."]]]
    expert_groups: ExpertGroups
    # For the chunks of one layer, beside what `expert_groups` hands out.
    chunk_room: Callable[[], ChunkRoom] = ChunkRoom


def open_source(
    path: str | os.PathLike[str],
    *,
    memory_budget: int = 4 << 30,
    scratch_dir: pathlib.Path | None = None,
) -> Source:
    """Opens a T5X checkpoint, a Hugging Face folder or a packed store, whichever lies at `path`.

    Args:
      path: a folder, of T5X checkpoints also a URL; of these the step's folder, or the one that
        holds the steps.
      memory_budget, scratch_dir: see `t5x_experts.expert_groups`.

    Raises:
      CheckpointError: it is none of them, or it is damaged, or it has to be copied first.
      ValueError: its parameters are not those of a Switch Transformer.
    """
    match formats.detect(path):
        case "packed":
            return _packed_source(packed.open_checkpoint(pathlib.Path(path)))
        case "huggingface":
            return _huggingface_source(huggingface.open_checkpoint(pathlib.Path(path)))
        case "t5x":
            return _t5x_source(formats.open_t5x(path), memory_budget, scratch_dir)
        case "published":
            what = "a pack of the published QMoE code"
        case "orbax":
            what = "a packed checkpoint in Orbax's form"
    raise CheckpointError(f"{path} is {what}: import it first (--run_mode=import).")


def _t5x_source(
    checkpoint: t5x.T5xCheckpoint, memory_budget: int, scratch_dir: pathlib.Path | None
) -> Source:
    config = configs.config_from_shapes(t5x.shapes(checkpoint))
    t5x.open_arrays(checkpoint, list(checkpoint.leaves))  # a missing array shows now, not in hours

    def expert_groups(
        stack: Stack, layer: int, group_size: int, start: int = 0
    ) -> Iterator[ExpertGroup]:
        prefix = f"{stack}/layers_{layer}/mlp/expert"
        names = {f"{prefix}/{name}/kernel": name for name in configs.expert_matrices(config)}
        for group in t5x_experts.expert_groups(
            checkpoint,
            list(names),
            group_size,
            memory_budget=memory_budget,
            scratch_dir=scratch_dir,
            start=start,
        ):
            arrays = {names[path]: array for path, array in group.arrays.items()}
            yield dataclasses.replace(group, arrays=arrays)

    def chunk_room() -> ChunkRoom:
        layers = configs.sparse_places(config)
        stack, layer = layers[0]
        prefix = f"{stack}/layers_{layer}/mlp/expert"
        names = [f"{prefix}/{name}/kernel" for name in configs.expert_matrices(config)]
        return t5x_experts.chunk_room(checkpoint, names, memory_budget)

    return Source(
        path=checkpoint.path,
        format="t5x",
        config=config,
        step=checkpoint.step,
        nbytes=t5x.nbytes(checkpoint),
        read=functools.partial(t5x.read_many, checkpoint),
        expert_groups=expert_groups,
        chunk_room=chunk_room,
    )


def layer_params(source: Source, stack: Stack, layer: int) -> dict[str, np.ndarray]:
    """The parameters of one layer that are no experts, by their paths below the layer."""
    read = source.read(configs.dense_paths(source.config, stack, layer))
    return {name.removeprefix(f"{stack}/layers_{layer}/"): array for name, array in read.items()}


def outer_params(source: Source) -> dict[str, np.ndarray]:
    """The parameters outside of all layers, by their T5X paths."""
    return dict(source.read(configs.outer_paths(source.config)))


def all_params(source: Source) -> dict[str, np.ndarray]:
    """All parameters by their T5X paths, experts dequantized: for models that memory holds."""
    return {name: array for part in param_parts(source) for name, array in part.items()}


def param_parts(source: Source) -> Iterator[dict[str, np.ndarray]]:
    """`all_params`, at most a layer at a time."""
    config = source.config
    for paths in dense_reads(config):
        yield dict(source.read(paths))
    for stack in configs.STACKS:
        for layer in configs.sparse_layers(config, stack):
            groups = list(source.expert_groups(stack, layer, config.num_experts))
            for name in configs.expert_matrices(config):
                stacked = np.concatenate([group.arrays.pop(name) for group in groups])
                yield {f"{stack}/layers_{layer}/mlp/expert/{name}/kernel": stacked}


def dense_reads(config: SwitchConfig) -> Iterator[list[str]]:
    """T5X paths of all that are no experts, as they are read together: outer, layer by layer."""
    yield configs.outer_paths(config)
    for stack in configs.STACKS:
        for layer in range(configs.num_layers(config, stack)):
            yield configs.dense_paths(config, stack, layer)


def dense_arrays(source: Source) -> Iterator[dict[str, Shaped[np.ndarray, "..."]]]:
    """All parameters that are no experts by their T5X paths, in the batches of `dense_reads`.

    Raises:
      CheckpointError: one holds NaN or infinity, or the source is damaged.
    """
    for paths in dense_reads(source.config):
        arrays = dict(source.read(paths))
        check_finite(source, arrays)
        yield arrays


def expert_arrays(
    source: Source, group_bytes: int = _GROUP_BYTES
) -> Iterator[tuple[str, ExpertGroup]]:
    """All experts, layer by layer, in groups of about `group_bytes` as float32.

    Returns:
      The path that a layer's experts are below, such as `encoder/layers_1/mlp/expert`, and a group.

    Raises:
      CheckpointError: a value is NaN or infinity, or the source is damaged.
    """
    config = source.config
    expert_bytes = 4 * len(configs.expert_matrices(config)) * config.emb_dim * config.expert_mlp_dim
    group_size = max(1, min(config.num_experts, group_bytes // expert_bytes))
    for stack in configs.STACKS:
        for layer in configs.sparse_layers(config, stack):
            prefix = f"{stack}/layers_{layer}/mlp/expert"
            for group in source.expert_groups(stack, layer, group_size):
                check_finite(source, group.arrays, f"{prefix}/")
                yield prefix, group


def check_finite(source: Source, params: Mapping[str, np.ndarray], prefix: str = "") -> None:
    """Refuses NaN and infinities, by whatever damage they came; names are completed by `prefix`.

    Raises:
      CheckpointError: naming the first parameter that holds one.
    """
    for name, array in params.items():
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"`{prefix}{name}` of {source.path} holds NaN or infinity: the checkpoint is "
                "damaged, copy or convert it again."
            )


def _huggingface_source(checkpoint: huggingface.HfCheckpoint) -> Source:
    return Source(
        path=str(checkpoint.path),
        format="huggingface",
        config=checkpoint.config,
        step=None,
        nbytes=checkpoint.nbytes,
        read=functools.partial(huggingface.read, checkpoint),
        expert_groups=functools.partial(huggingface.expert_groups, checkpoint),
    )


def _packed_source(checkpoint: PackedCheckpoint) -> Source:
    def expert_groups(
        stack: Stack, layer: int, group_size: int, start: int = 0
    ) -> Generator[ExpertGroup, None, None]:
        for group, experts in packed.read_groups(checkpoint, stack, layer, start):
            yield from dequantized(group.start, experts, group_size, max(0, start - group.start))

    return Source(
        path=str(checkpoint.path),
        format="packed",
        config=checkpoint.header.config,
        step=checkpoint.header.source.get("step"),
        nbytes=checkpoint.nbytes,
        read=lambda names: packed.read_params(checkpoint, list(names)),
        expert_groups=expert_groups,
    )


def dequantized(
    start: int, experts: Mapping[str, packed.Experts], group_size: int, skipped: int = 0
) -> Iterator[ExpertGroup]:
    """One group of a packed store in parts of dense matrices, the first `skipped` left out.

    `start` is the number of the group's first expert.
    """
    count = experts["wo"].shape[0]
    for first in range(skipped, count, group_size):
        size = min(group_size, count - first)
        arrays = {name: dense_kernel(record, first, size) for name, record in experts.items()}
        yield ExpertGroup(start + first, start + first + size, arrays)


def dense_kernel(record: packed.Experts, first: int, count: int) -> Shaped[np.ndarray, "count C R"]:
    """Some experts of one matrix, dequantized, with T5X's axes `[expert, in, out]`."""
    part = slice(first, first + count)
    if isinstance(record, PackedExperts):
        trits = packing.unpack_ternary(record, first, count)
        kernel = sub1_decode.dequantize(trits, jnp.asarray(record.row_values[part]))
    elif isinstance(record, UniformExperts):
        levels = uniform.unpack_uniform(record, first, count)
        scale, zero = jnp.asarray(record.scale[part]), jnp.asarray(record.zero[part])
        kernel = uniform.dequantize_uniform(levels, scale, zero, record.group_size)
    else:
        return np.asarray(record[part])
    return np.asarray(kernel).swapaxes(1, 2)
