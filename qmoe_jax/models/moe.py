# SPDX-License-Identifier: Apache-2.0
"""The sparse sub-layer, and the joint through which its experts are called."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.config import SwitchConfig, expert_matrices, input_matrices
from qmoe_jax.models.layers import Dense, Kernel, activate, kernel_init, matmul
from qmoe_jax.models.routing import (
    Capacity,
    choose_experts,
    load_balance_loss,
    rank_within_expert,
    router_z_loss,
    routing_plan,
)

# experts(variables, x_ND, expert_index_N) -> y_ND: row n through expert expert_index_N[n]; index E
# (one past the last expert) marks a dropped token, whose row is 0. `variables` are the Linen
# variables below `mlp/expert`: {"params": {"wi": {"kernel": ...}, ...}}, or another collection.
# In training with expert dropout they also hold {"dropout": {"hidden_scale": Float[E, F]}}, by
# which the hidden units of each expert are to be multiplied.
ExpertsFn: TypeAlias = Callable[
    [Mapping[str, Any], Float[Array, "N D"], Int[Array, " N"]], Float[Array, "N D"]
]

_MIN_TILE, _MAX_TILE = 8, 128  # rows; a power of two near the mean load in between


def dense_experts(
    variables: Mapping[str, Any],
    x_ND: Float[Array, "N D"],
    expert_index_N: Int[Array, " N"],
    *,
    activations: tuple[str, ...] = ("relu",),
) -> Float[Array, "N D"]:
    """The `ExpertsFn` of uncompressed experts, stacked `[E, in, out]` in `params`.

    Tokens are laid out in tiles of rows that share an expert, and a loop passes over just the
    tiles in use: one expert's matrices and one tile's hidden units at a time, never an array of
    tokens times experts. Computes in the dtype of `x_ND`. Differentiable in reverse mode.

    Raises:
      ValueError: `variables` has no dense experts.
    """
    if "params" not in variables:
        raise ValueError(
            "The parameters of `mlp/expert` are missing. Packed experts need the callable that "
            "reads them, passed to the model as `experts`."
        )
    weights = {name: leaf["kernel"] for name, leaf in variables["params"].items()}
    weights |= variables.get("dropout", {})
    layout = _tile_layout(expert_index_N, weights["wo"].shape[0])
    num_tiles, rows = layout.expert_of_tile.shape[0], layout.rows
    D = x_ND.shape[1]
    tiled = jnp.zeros((num_tiles * rows, D), x_ND.dtype).at[layout.row_N].set(x_ND, mode="drop")
    tiled = _map_tiles(
        activations,
        weights,
        tiled.reshape(num_tiles, rows, D),
        layout.expert_of_tile,
        layout.tiles_used,
    )
    return tiled.reshape(-1, D).at[layout.row_N].get(mode="fill", fill_value=0)


class _TileLayout(NamedTuple):
    rows: int  # of one tile
    row_N: Int[Array, " N"]  # place of each token; past the end for dropped tokens
    expert_of_tile: Int[Array, " tiles"]
    tiles_used: Int[Array, ""]


def _tile_layout(expert_index_N: Int[Array, " N"], num_experts: int) -> _TileLayout:
    """Places tokens by expert, each expert's first token at the start of a tile."""
    N, E = expert_index_N.shape[0], num_experts
    rows = min(_MAX_TILE, max(_MIN_TILE, 1 << (max(N // E, 1) - 1).bit_length()))
    reached = min(E, N)  # at worst, so many experts leave their last tile unfilled
    num_tiles = max(1, reached + (N - reached) // rows)

    tokens_E = jnp.zeros(E, jnp.int32).at[expert_index_N].add(1, mode="drop")
    tiles_E = (tokens_E + rows - 1) // rows
    end_E = jnp.cumsum(tiles_E)
    start_N = (end_E - tiles_E).at[expert_index_N].get(mode="fill", fill_value=num_tiles)
    return _TileLayout(
        rows,
        start_N * rows + rank_within_expert(expert_index_N, E),
        jnp.repeat(jnp.arange(E), tiles_E, total_repeat_length=num_tiles),
        end_E[-1],
    )


def expert_mlp(
    activations: tuple[str, ...], weights: Mapping[str, Array], x_ND: Float[Array, "N D"]
) -> Float[Array, "N D"]:
    """One expert's MLP; `weights` are its matrices and, in training, its `hidden_scale`."""
    weights = {name: weight.astype(x_ND.dtype) for name, weight in weights.items()}
    projections = [matmul(x_ND, weights[name]) for name in input_matrices(activations)]
    hidden_NF = activate(activations, projections)
    if "hidden_scale" in weights:
        hidden_NF = hidden_NF * weights["hidden_scale"][None]
    return matmul(hidden_NF, weights["wo"])


def _each_tile(
    activations: tuple[str, ...],
    weights: dict[str, Array],
    x_TND: Float[Array, "tiles N D"],
    expert_of_tile: Int[Array, " tiles"],
    used: Int[Array, ""],
) -> Float[Array, "tiles N D"]:
    """Each of the first `used` tiles through its expert; the rest are 0."""

    def body(t: Array, y_TND: Array) -> Array:
        own = jax.tree.map(lambda leaf: leaf[expert_of_tile[t]], weights)
        return y_TND.at[t].set(expert_mlp(activations, own, x_TND[t]))

    return jax.lax.fori_loop(0, used, body, jnp.zeros_like(x_TND))


def _each_tile_forward(activations, weights, x_TND, expert_of_tile, used):
    y_TND = _each_tile(activations, weights, x_TND, expert_of_tile, used)
    return y_TND, (weights, x_TND, expert_of_tile, used)


def _each_tile_backward(activations, saved, dy_TND):
    weights, x_TND, expert_of_tile, used = saved

    def body(t: Array, totals: tuple[dict[str, Array], Array]) -> tuple[dict[str, Array], Array]:
        d_weights, dx_TND = totals
        e = expert_of_tile[t]
        own = jax.tree.map(lambda leaf: leaf[e], weights)
        _, pull_back = jax.vjp(functools.partial(expert_mlp, activations), own, x_TND[t])
        d_own, dx_ND = pull_back(dy_TND[t])
        d_weights = jax.tree.map(lambda total, one: total.at[e].add(one), d_weights, d_own)
        return d_weights, dx_TND.at[t].set(dx_ND)

    zeros = (jax.tree.map(jnp.zeros_like, weights), jnp.zeros_like(x_TND))
    d_weights, dx_TND = jax.lax.fori_loop(0, used, body, zeros)
    return d_weights, dx_TND, None, None


# JAX would keep one copy of the weights per tile for the derivative, and add up one gradient of
# the whole stack per tile; this keeps the inputs alone, and adds to one expert's gradient.
_map_tiles = jax.custom_vjp(_each_tile, nondiff_argnums=(0,))
_map_tiles.defvjp(_each_tile_forward, _each_tile_backward)


class RouterWeights(nn.Module):
    """The router's one matrix, in float32; T5X nests it as `router_weights/w/kernel`."""

    num_experts: int

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
        return Dense(self.num_experts, jnp.float32, nn.initializers.normal(2e-2), name="w")(x_BLD)


class Router(nn.Module):
    """Logits of every expert for every token."""

    num_experts: int

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
        return RouterWeights(self.num_experts, name="router_weights")(x_BLD)


class Experts(nn.Module):
    """The scope `expert`: hands its variables, of whatever collection, to the experts' callable."""

    config: SwitchConfig
    experts: ExpertsFn | None

    @nn.compact
    def __call__(
        self,
        x_ND: Float[Array, "N D"],
        expert_index_N: Int[Array, " N"],
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "N D"]:
        config = self.config
        E, D, F = config.num_experts, config.emb_dim, config.expert_mlp_dim
        if self.is_initializing():  # applied to packed experts, no dense ones are needed
            for name in expert_matrices(config):
                shape = (E, F, D) if name == "wo" else (E, D, F)
                Kernel(shape, kernel_init(stack_axes=(0,)), name=name)()
        variables = dict(self.variables)
        if enable_dropout and config.expert_dropout_rate > 0:
            dropout = nn.Dropout(config.expert_dropout_rate)
            scale_EF = dropout(jnp.ones((E, F)), deterministic=False)
            variables["dropout"] = {"hidden_scale": scale_EF}
        experts = self.experts or functools.partial(
            dense_experts, activations=config.mlp_activations
        )
        return experts(variables, x_ND, expert_index_N)


class MoeMlp(nn.Module):
    """The feed-forward sub-layer of a sparse layer: a router and E experts, one per token.

    Attributes:
      experts: what computes the experts; None: `dense_experts`.
      capacity: the rule by which tokens are dropped, see `routing_plan`.
    """

    config: SwitchConfig
    experts: ExpertsFn | None = None
    capacity: Capacity = "none"

    def setup(self) -> None:
        self.router = Router(self.config.num_experts)
        self.expert = Experts(self.config, self.experts)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        valid_BL: Bool[Array, "B L"],
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "B L D"]:
        """`prob * expert(x)` in float32, whatever the dtype of `x`; 0 for dropped tokens."""
        B, L, D = x_BLD.shape
        expert_index_BL, prob_BL = self.route(x_BLD, valid_BL, enable_dropout=enable_dropout)
        y_ND = self.expert(
            x_BLD.reshape(-1, D), expert_index_BL.reshape(-1), enable_dropout=enable_dropout
        )
        return prob_BL[:, :, None] * y_ND.reshape(B, L, D).astype(jnp.float32)

    def route(
        self,
        x_BLD: Float[Array, "B L D"],
        valid_BL: Bool[Array, "B L"],
        *,
        enable_dropout: bool = False,
    ) -> tuple[Int[Array, "B L"], Float[Array, "B L"]]:
        """The expert of each token, and the probability that its output is multiplied by.

        Padding must be zero in `x_BLD`. It is routed as T5X does (to expert 0, whose capacity it
        uses up), but returned as dropped: without biases an expert of 0 is 0.

        Sows into `intermediates`: `expert_index` and `router_prob` [G, T] as routed, with padding;
        `auxiliary_loss`, `router_z_loss`.
        """
        B, L, _ = x_BLD.shape
        E = self.config.num_experts
        plan = routing_plan(self.config, B, L, self.capacity, training=enable_dropout)
        padding = ((0, plan.pad_batch), (0, plan.pad_length), (0, 0))
        logits_BLE = jnp.pad(self.router(x_BLD), padding)  # those of zero tokens
        logits_GTE = logits_BLE.reshape(plan.num_groups, plan.tokens_per_group, E)
        prob_GTE = jax.nn.softmax(logits_GTE, axis=-1)
        expert_index_GT, prob_GT = choose_experts(prob_GTE, plan.capacity)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "expert_index", expert_index_GT)
            self.sow("intermediates", "router_prob", prob_GT)
            self.sow("intermediates", "auxiliary_loss", load_balance_loss(prob_GTE))
            self.sow("intermediates", "router_z_loss", router_z_loss(logits_GTE))
        expert_index_BL = expert_index_GT.reshape(logits_BLE.shape[:2])[:B, :L]
        prob_BL = prob_GT.reshape(logits_BLE.shape[:2])[:B, :L]
        return jnp.where(valid_BL, expert_index_BL, E), prob_BL
