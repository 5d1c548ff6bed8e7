# SPDX-License-Identifier: Apache-2.0
"""Training on several devices: a mesh of data rows times expert partitions.

Batches are cut over all devices, expert stacks (and their optimizer state) over the partitions of a
row; all else is on every device. The compiler finds the communication of the dense part; that of
the experts is written out here.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.moe import ExpertsFn, dense_experts

DATA, EXPERT = "data", "expert"
_TOKENS = P((DATA, EXPERT))
_STACK = P(EXPERT)


def make_mesh(
    num_experts: int, partitions: int | None = None, devices: Iterable[Any] | None = None
) -> Mesh:
    """The devices as `[data rows, expert partitions]`.

    Args:
      num_experts: of a sparse layer.
      partitions: that experts are spread over (T5X: NUM_EXPERT_PARTITIONS); None: as many as divide
        both the experts and the devices.
      devices: None: all.

    Raises:
      ValueError: partitions that do not divide both; or there are several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"training uses the devices of one process, but {jax.process_count()} were started "
            "(jax.distributed): start one"
        )
    devices = list(jax.devices() if devices is None else devices)
    most = math.gcd(len(devices), num_experts)
    partitions = most if partitions is None else partitions
    if partitions < 1 or most % partitions:
        raise ValueError(
            f"NUM_EXPERT_PARTITIONS is {partitions}; expected a number that divides the "
            f"{len(devices)} devices and the {num_experts} experts, such as {most}"
        )
    grid = np.asarray(devices).reshape(-1, partitions)
    return Mesh(grid, (DATA, EXPERT), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is that of the batch."""
    return NamedSharding(mesh, _TOKENS)


def state_shardings(mesh: Mesh, state: Any, num_experts: int) -> Any:
    """The sharding of each array of a tree that holds parameters or what is kept for each."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        stacked = any(getattr(key, "key", None) == "expert" for key in path)
        cut = stacked and leaf.ndim > 0 and leaf.shape[0] == num_experts
        return NamedSharding(mesh, _STACK if cut else P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def experts_on(mesh: Mesh, config: SwitchConfig) -> ExpertsFn | None:
    """The experts' callable for a mesh; None, the model's own, where there is one device."""
    if mesh.size == 1:
        return None
    return functools.partial(_sharded_experts, mesh, config.mlp_activations)


def _sharded_experts(
    mesh: Mesh,
    activations: tuple[str, ...],
    variables: Mapping[str, Any],
    x_ND: Float[Array, "N D"],
    expert_index_N: Int[Array, " N"],
) -> Float[Array, "N D"]:
    """`dense_experts`, each device computing with its own experts for the tokens of its row."""

    def on_each(weights: Mapping[str, Any], x_ND: Array, expert_index_N: Array) -> Array:
        x_ND = jax.lax.all_gather(x_ND, EXPERT, tiled=True)
        index_N = jax.lax.all_gather(expert_index_N, EXPERT, tiled=True)
        here = jax.tree.leaves(weights)[0].shape[0]
        index_N = index_N - jax.lax.axis_index(EXPERT) * here
        index_N = jnp.where((index_N >= 0) & (index_N < here), index_N, here)  # else: dropped
        y_ND = dense_experts(weights, x_ND, index_N, activations=activations)
        return jax.lax.psum_scatter(y_ND, EXPERT, tiled=True)

    weights = {name: variables[name] for name in ("params", "dropout") if name in variables}
    # The custom derivative of `dense_experts` is not annotated with what varies over which axis.
    mapped = jax.shard_map(
        on_each, mesh=mesh, in_specs=(_STACK, _TOKENS, _TOKENS), out_specs=_TOKENS, check_vma=False
    )
    return mapped(weights, x_ND, expert_index_N)
