# SPDX-License-Identifier: Apache-2.0
"""Top-1 routing: groups of tokens, capacity of experts, balancing losses."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qmoe_jax.models.config import SwitchConfig

Capacity: TypeAlias = Literal["none", "t5x"]


class RoutingPlan(NamedTuple):
    """How a batch is cut into groups; each expert takes `capacity` tokens of a group at most."""

    pad_batch: int
    pad_length: int
    num_groups: int
    tokens_per_group: int
    capacity: int | None  # None: as many as come


def routing_plan(
    config: SwitchConfig, batch: int, length: int, rule: Capacity, *, training: bool = False
) -> RoutingPlan:
    """The groups and the capacity for `batch` x `length` tokens.

    "none" drops nothing. "t5x" is the rule of T5X on one device: tokens are padded to a multiple
    of the experts, by whole rows or whole columns, whichever adds fewer tokens (columns if equal);
    the number of groups is the smallest multiple of the experts that divides the tokens and is at
    least `tokens // group_size`.

    Raises:
      ValueError: an unknown rule.
    """
    if rule == "none":
        return RoutingPlan(0, 0, 1, batch * length, None)
    if rule != "t5x":
        raise ValueError(f'`capacity` must be "none" or "t5x", got {rule!r}.')
    E = config.num_experts
    pad_batch = next(n for n in range(E) if (batch + n) * length % E == 0)
    pad_length = next(n for n in range(E) if (length + n) * batch % E == 0)
    if pad_length * batch > pad_batch * length:
        pad_length = 0
    else:
        pad_batch = 0
    tokens = (batch + pad_batch) * (length + pad_length)
    fewest = max(tokens // config.group_size, E)
    num_groups = next(n for n in range(-(-fewest // E) * E, tokens + 1, E) if tokens % n == 0)
    tokens_per_group = tokens // num_groups
    factor = config.train_capacity_factor if training else config.eval_capacity_factor
    capacity = max(round(factor * tokens_per_group / E), config.min_expert_capacity)
    return RoutingPlan(pad_batch, pad_length, num_groups, tokens_per_group, capacity)


def rank_within_expert(expert_index_N: Int[Array, " N"], num_experts: int) -> Int[Array, " N"]:
    """How many earlier tokens chose the same expert; indices run from 0 to E (dropped)."""
    order_N = jnp.argsort(expert_index_N, stable=True)
    tokens = jnp.zeros(num_experts + 1, jnp.int32).at[expert_index_N].add(1)
    first = jnp.cumsum(tokens) - tokens
    rank_N = jnp.arange(order_N.size, dtype=jnp.int32) - first[expert_index_N[order_N]]
    return jnp.zeros_like(rank_N).at[order_N].set(rank_N)


def choose_experts(
    prob_GTE: Float[Array, "G T E"], capacity: int | None
) -> tuple[Int[Array, "G T"], Float[Array, "G T"]]:
    """The likeliest expert of each token, and its probability.

    Ties go to the lowest index. In each group an expert takes its first `capacity` tokens; the
    others are dropped: they get the index E.
    """
    E = prob_GTE.shape[-1]
    index_GT = jnp.argmax(prob_GTE, axis=-1)
    chosen_GT = jnp.take_along_axis(prob_GTE, index_GT[..., None], axis=-1)[..., 0]
    if capacity is not None:
        rank_GT = jax.vmap(rank_within_expert, (0, None))(index_GT, E)
        index_GT = jnp.where(rank_GT < capacity, index_GT, E)
    return index_GT, chosen_GT


def load_balance_loss(prob_GTE: Float[Array, "G T E"]) -> Float[Array, ""]:
    """Switch Transformer equations 4 to 6: E² · mean over groups and experts of f · P.

    f is the fraction of a group's tokens that prefer an expert (dropped ones included), P the
    mean probability of that expert. 1 when balanced.
    """
    E = prob_GTE.shape[-1]
    preferred_GTE = jax.nn.one_hot(jnp.argmax(prob_GTE, axis=-1), E, dtype=jnp.float32)
    return jnp.mean(jnp.mean(preferred_GTE, axis=1) * jnp.mean(prob_GTE, axis=1)) * E**2


def router_z_loss(logits_GTE: Float[Array, "G T E"]) -> Float[Array, ""]:
    """ST-MoE equation 5: mean squared log-sum-exp of the router's logits."""
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits_GTE, axis=-1)))
