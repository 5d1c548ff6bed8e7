# SPDX-License-Identifier: Apache-2.0
"""The idealised uncompressed model that the paper compares its speed with.

A model that does not fit anywhere is timed as if it did: all experts of a layer share one dense
buffer. A token's expert costs what it would cost, memory hardly anything; answers mean nothing.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from pallas_kernels import grouped_matmul
from qmoe_jax.inference.model import Model
from qmoe_jax.inference.packed_experts import through_matrices
from qmoe_jax.models import config as configs
from qmoe_jax.models.switch import Switch

COLLECTION = "shared"


def simulated_dense(model: Model) -> Model:
    """The same model, its experts replaced by one buffer a matrix and layer, of random numbers.

    The buffers are in the dtype of the model's activations.
    """
    config, dtype = model.config, model.module.dtype
    key = jax.random.key(0)
    shared: dict[str, Array] = {}
    for stack in configs.STACKS:
        for layer in configs.sparse_layers(config, stack):
            shapes = configs.layer_shapes(config, stack, layer)
            for name in configs.expert_matrices(config):
                _, columns, rows = shapes[f"mlp/expert/{name}/kernel"]
                key, drawn = jax.random.split(key)
                # A buffer of each layer's own: the cache is not to serve them all.
                buffer = jax.random.normal(drawn, (rows, columns)) / columns**0.5
                shared[f"{stack}/layers_{layer}/mlp/expert/{name}"] = buffer.astype(dtype)
    experts = functools.partial(
        one_buffer_experts, num_experts=config.num_experts, activations=config.mlp_activations
    )
    variables = {
        "params": _without_experts(model.variables["params"]),
        COLLECTION: unflatten_dict(shared, sep="/"),
    }
    return Model(Switch(config, dtype, experts), variables)


def one_buffer_experts(
    variables: Mapping[str, Any],
    x_ND: Float[Array, "N D"],
    expert_index_N: Int[Array, " N"],
    *,
    num_experts: int,
    activations: tuple[str, ...] = ("relu",),
) -> Float[Array, "N D"]:
    """The `moe.ExpertsFn` of experts that are all the same, each multiplied by itself.

    Args:
      variables: with the collection `shared`: matrices [rows, columns].
      x_ND, expert_index_N, activations: see `packed_experts`.
      num_experts: what dropped tokens have as their expert.
    """

    def times(x_NC: Array, name: str, sizes_E: Array) -> Array:
        weights_RC = variables[COLLECTION][name].astype(x_NC.dtype)
        return grouped_matmul.by_expert(x_NC, sizes_E, weights_RC.shape[0], lambda _: weights_RC)

    return through_matrices(x_ND, expert_index_N, num_experts, activations, times)


def _without_experts(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_experts(below) if isinstance(below, Mapping) else below
        for name, below in params.items()
        if name != "expert"
    }
