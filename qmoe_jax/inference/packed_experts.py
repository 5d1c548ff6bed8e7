# SPDX-License-Identifier: Apache-2.0
"""The experts of a packed model, computed from their packed weights.

They travel in the Linen collection `packed`, below `mlp/expert`:

    {"wi": PackedExperts, "wo": PackedExperts, "entries": uint32 [entries]}

or `UniformExperts`, which need no `entries`: the codec's table of words, one array for all layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import grouped_matmul, packed_matmul
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import PackedExperts, UniformExperts
from pallas_kernels.packed_matmul import Path
from qmoe_jax.codec import uniform
from qmoe_jax.models.config import input_matrices
from qmoe_jax.models.layers import activate

COLLECTION = "packed"


def packed_experts(
    variables: Mapping[str, Any],
    x_ND: Float[Array, "N D"],
    expert_index_N: Int[Array, " N"],
    *,
    activations: tuple[str, ...] = ("relu",),
    implementation: Implementation = "auto",
    path: Path = "auto",
) -> Float[Array, "N D"]:
    """The `moe.ExpertsFn` of packed experts: only those that tokens chose are decoded.

    Args:
      variables: with the collection `packed`.
      x_ND: the tokens; all is computed in their dtype, summed in float32.
      expert_index_N: of each token; one past the last for dropped ones, whose rows are 0.
      activations: of the model's MLP.
      implementation: see `pallas_kernels.implementation.resolve`.
      path: see `packed_matmul`; of ternary experts only.
    """
    records = dict(variables[COLLECTION])
    entries = records.pop("entries", None)

    def times(x_NC: Array, name: str, sizes_E: Array) -> Array:
        return _times(x_NC, records[name], entries, sizes_E, implementation, path)

    experts = records["wo"].shape[0]
    return through_matrices(x_ND, expert_index_N, experts, activations, times)


def through_matrices(
    x_ND: Float[Array, "N D"],
    expert_index_N: Int[Array, " N"],
    num_experts: int,
    activations: tuple[str, ...],
    times: Callable[[Array, str, Array], Array],
) -> Float[Array, "N D"]:
    """An expert's MLP for tokens in any order, from products for tokens sorted by expert.

    Args:
      times: of tokens [N, C], a matrix's name and the tokens of each expert [E]: the products
        [N, R], 0 for the tokens of none, which come last.
    """
    order_N = jnp.argsort(expert_index_N, stable=True)
    sizes_E = jnp.zeros(num_experts, jnp.int32).at[expert_index_N].add(1, mode="drop")
    sorted_ND = x_ND[order_N]
    projections = [times(sorted_ND, name, sizes_E) for name in input_matrices(activations)]
    y_ND = times(activate(activations, projections), "wo", sizes_E)
    return jnp.zeros_like(y_ND).at[order_N].set(y_ND)


def _times(
    x_NC: Float[Array, "N C"],
    record: PackedExperts | UniformExperts,
    entries: Any,
    sizes_E: Int[Array, " E"],
    choice: Implementation,
    path: Path,
) -> Float[Array, "N R"]:
    """Tokens, sorted by expert, times one matrix of theirs."""
    if isinstance(record, PackedExperts):
        return packed_matmul.packed_matmul(
            x_NC, record, entries, sizes_E, implementation=choice, path=path
        )

    def matrix(expert):
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, expert, 1), record)
        levels = uniform.unpack_uniform(own, 0, 1)
        return uniform.dequantize_uniform(
            levels, own.scale, own.zero, record.group_size, x_NC.dtype
        )[0]

    return grouped_matmul.by_expert(x_NC, sizes_E, record.shape[1], matrix)
