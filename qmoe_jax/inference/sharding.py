# SPDX-License-Identifier: Apache-2.0
"""A model on several devices: each holds some of the experts of every sparse layer.

All else is on every device, and every device computes it. At an expert layer each has all tokens,
computes those of its own experts, and the results are summed: tokens travel, weights do not.
"""

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels import packed as packed_lib
from pallas_kernels import packed_matmul
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import PackedExperts, UniformExperts
from qmoe_jax.checkpoints import packed, source
from qmoe_jax.checkpoints.packed_arrays import Experts
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.codec import packing
from qmoe_jax.inference.packed_experts import COLLECTION, packed_experts
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack, SwitchConfig
from qmoe_jax.models.moe import ExpertsFn, dense_experts

EXPERT = "expert"


def expert_mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """Devices side by side, over which the experts of a layer are to be divided.

    Args:
      devices: which, or how many of `jax.devices()`; None: all of them.

    Raises:
      ValueError: there are not so many, or none; or several processes were started.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"inference uses the devices of one process, but {jax.process_count()} were started "
            "(jax.distributed): start one"
        )
    found = jax.devices()
    if isinstance(devices, int):
        if not 1 <= devices <= len(found):
            raise ValueError(f"`devices` is {devices}; expected 1 to {len(found)}, which are there")
        devices = found[:devices]
    chosen = list(found if devices is None else devices)
    if not chosen:
        raise ValueError("`devices` is empty; expected one device or more")
    return Mesh(np.asarray(chosen), (EXPERT,), axis_types=(AxisType.Auto,))


def experts_per_device(mesh: Mesh, num_experts: int) -> int:
    """How many experts of each sparse layer a device of the mesh holds.

    Raises:
      ValueError: the experts do not divide by the devices, or it is another kind of mesh.
    """
    if mesh.axis_names != (EXPERT,) or mesh.axis_types != (AxisType.Auto,):
        raise ValueError(f"`mesh` is {mesh}; expected one that `expert_mesh` made")
    if num_experts % mesh.size:
        fit = [str(n) for n in range(1, mesh.size) if num_experts % n == 0]
        raise ValueError(
            f"{num_experts} experts do not divide by {mesh.size} devices: make a mesh of "
            f"{', '.join(fit)} devices"
        )
    return num_experts // mesh.size


def sharded_experts(
    mesh: Mesh, config: SwitchConfig, implementation: Implementation = "auto"
) -> ExpertsFn:
    """The experts' callable for a mesh: of packed experts, or of dense ones.

    A token has one expert, so that of the devices' results all but one are 0: the sum is exact.
    Bits may still differ from one device's: a program compiled for other shapes may round
    otherwise.

    What travels: for each layer the results of all N tokens, an all-reduce of `[N, D]` in the dtype
    of the activations on every device, however few of them are its own. That is little for
    decoding; for many tokens an all-to-all would send less.

    Args:
      mesh: of `expert_mesh`; the experts' arrays are cut along their first axis, in its order.
      config: of the model.
      implementation: of the products with packed experts.

    Raises:
      ValueError: see `experts_per_device`.
    """
    experts_per_device(mesh, config.num_experts)
    return functools.partial(_sharded_experts, mesh, config, implementation)


def _sharded_experts(
    mesh: Mesh,
    config: SwitchConfig,
    implementation: Implementation,
    variables: Mapping[str, Any],
    x_ND: Float[Array, "N D"],
    expert_index_N: Int[Array, " N"],
) -> Float[Array, "N D"]:
    packs = COLLECTION in variables
    collection = COLLECTION if packs else "params"
    weights = dict(variables[collection])
    here = experts_per_device(mesh, config.num_experts)
    compute: ExpertsFn = functools.partial(dense_experts, activations=config.mlp_activations)
    if packs:
        # All experts share the tokens: a device's own get their part only.
        path = packed_matmul.choose_path(x_ND.shape[0], config.num_experts, implementation)
        compute = functools.partial(
            packed_experts,
            activations=config.mlp_activations,
            implementation=implementation,
            path=path,
        )

    def on_each(weights: Mapping[str, Any], x_ND: Array, index_N: Array) -> Array:
        own = {name: _counted(record) for name, record in weights.items()}
        index_N = index_N - jax.lax.axis_index(EXPERT) * here
        index_N = jnp.where((index_N >= 0) & (index_N < here), index_N, here)  # else: dropped
        return jax.lax.psum(compute({collection: own}, x_ND, index_N), EXPERT)

    specs = {name: P() if name == "entries" else P(EXPERT) for name in weights}
    # The custom derivative of `dense_experts` is not annotated with what varies over the devices.
    mapped = jax.shard_map(
        on_each, mesh=mesh, in_specs=(specs, P(), P()), out_specs=P(), check_vma=False
    )
    return mapped(weights, x_ND, expert_index_N)


def replicated(mesh: Mesh, arrays: Any) -> Any:
    """A tree of host arrays, each on every device."""
    return jax.device_put(arrays, NamedSharding(mesh, P()))


def dense_params(opened: Source, mesh: Mesh) -> dict[str, Array]:
    """As `source.all_params`, each expert on its device alone, the rest on every one.

    Raises:
      CheckpointError: the source is damaged.
      ValueError: see `experts_per_device`.
    """
    config = opened.config
    size = experts_per_device(mesh, config.num_experts)
    params: dict[str, Array] = {}
    for names in source.dense_reads(config):
        params |= replicated(mesh, dict(opened.read(names)))
    for stack in configs.STACKS:
        for layer in configs.sparse_layers(config, stack):
            groups = opened.expert_groups(stack, layer, size)
            slabs = _slabs(((group.start, group.arrays) for group in groups), size)
            for name, kernel in _assembled(mesh, slabs).items():
                params[f"{stack}/layers_{layer}/mlp/expert/{name}/kernel"] = kernel
    return params


def packed_layer(
    checkpoint: PackedCheckpoint, stack: Stack, layer: int, mesh: Mesh
) -> dict[str, Experts]:
    """As `packed.load_layer`, each expert on its device alone: one slab on each.

    Raises:
      CheckpointError: see `packed.read_group`.
      ValueError: a layer without experts; see also `experts_per_device`.
    """
    size = experts_per_device(mesh, checkpoint.header.config.num_experts)
    words: dict[str, int] = {}
    if checkpoint.header.codec in packing.CODECS:
        words = packed.slab_words(checkpoint, stack, layer, mesh.size)
    groups = packed.read_groups(checkpoint, stack, layer)
    return _assembled(
        mesh, _slabs(((group.start, experts) for group, experts in groups), size, words)
    )


def _slabs(
    groups: Iterable[tuple[int, Mapping[str, Any]]],
    size: int,
    slab_words: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Cuts groups, given in order with their first expert, anew: into `size` experts each."""
    held: list[dict[str, Any]] = []
    for start, experts in groups:
        count, at = experts["wo"].shape[0], 0
        while at < count:
            taken = min(count - at, size - (start + at) % size)
            held.append({name: _cut(record, at, taken) for name, record in experts.items()})
            at += taken
            if (start + at) % size == 0:
                parts, held = held, []
                yield {
                    name: _join([part.pop(name) for part in parts], (slab_words or {}).get(name, 0))
                    for name in list(parts[0])
                }


def _cut(record: Any, first: int, count: int) -> Any:
    if (first, count) == (0, record.shape[0]):
        return record
    if isinstance(record, PackedExperts):
        return packed_lib.expert_slice(record, first, count)
    return _counted(jax.tree.map(operator.itemgetter(slice(first, first + count)), record))


def _join(parts: list[Any], slab_words: int) -> Any:
    if isinstance(parts[0], PackedExperts):
        return packed_lib.join(parts, slab_words=slab_words)
    if isinstance(parts[0], UniformExperts):
        return packed_lib.join_uniform(parts)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _assembled(mesh: Mesh, slabs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Arrays of all experts from one slab for each device, which is asked for one by one."""
    placed = [
        jax.device_put(slab, device) for slab, device in zip(slabs, mesh.devices.flat, strict=True)
    ]

    def whole(*parts: Array) -> Array:
        shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
        sharding = NamedSharding(mesh, P(EXPERT))
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return {name: _counted(record) for name, record in jax.tree.map(whole, *placed).items()}


def _counted(record: Any) -> Any:
    """A record under the number of experts that its arrays have; all else as it is."""
    if isinstance(record, PackedExperts | UniformExperts):
        return packed_lib.local_view(record)
    return record
