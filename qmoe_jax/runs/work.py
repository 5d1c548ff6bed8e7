# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic each step of a run is, so that a progress bar can tell the time left."""

from collections.abc import Iterable, Mapping

from qmoe_jax.models.config import (
    STACKS,
    Stack,
    SwitchConfig,
    expert_matrices,
    num_layers,
    sparse_layers,
)


def dense_part(
    config: SwitchConfig, stack: Stack, sparse: bool, tokens: Mapping[Stack, int]
) -> float:
    """Operations of one block's dense part, without the attention scores."""
    attention = config.emb_dim * config.num_heads * config.head_dim  # weights of one projection
    inner = config.num_experts if sparse else config.mlp_dim * _matrices(config)
    total = 2.0 * (4 * attention + config.emb_dim * inner) * tokens[stack]
    if stack == "decoder":  # it attends to the encoder's tokens too, by keys and values of its own
        total += 2.0 * 2 * attention * (tokens["decoder"] + tokens["encoder"])
    return total


def expert_group(config: SwitchConfig, experts: int, tokens: int, solved: bool) -> float:
    """Operations of `experts` experts that `tokens` tokens pass: forward, Hessians, solve.

    Hessians are counted for every token, as if all were calibration's.
    """
    total = forward(config, tokens)
    if solved:
        total += hessians(config, tokens) + solve(config, experts)
    return total


def forward(config: SwitchConfig, tokens: int) -> float:
    """Operations of `tokens` tokens through their experts."""
    return 2.0 * config.emb_dim * config.expert_mlp_dim * _matrices(config) * tokens


def hessians(config: SwitchConfig, tokens: int) -> float:
    """Operations of adding tokens to the Hessians: hidden units, and a triangle each."""
    D, F = config.emb_dim, config.expert_mlp_dim
    return (2.0 * D * F * (_matrices(config) - 1) + D * D + F * F) * tokens


def solve(config: SwitchConfig, experts: int) -> float:
    """Operations of GPTQ, 2 x rows x columns^2 for a matrix, and of its factorizations."""
    D, F = config.emb_dim, config.expert_mlp_dim
    return (2.0 * ((_matrices(config) - 1) * F * D * D + D * F * F) + (D**3 + F**3) / 3) * experts


def blocks(
    config: SwitchConfig,
    stack: Stack,
    layers: Iterable[int],
    tokens: Mapping[Stack, int],
    solved: bool,
) -> float:
    """Operations of the walk over some blocks of a stack."""
    sparse, total = sparse_layers(config, stack), 0.0
    for layer in layers:
        total += dense_part(config, stack, layer in sparse, tokens)
        if layer in sparse:
            total += expert_group(config, config.num_experts, tokens[stack], solved)
    return total


def whole_run(config: SwitchConfig, tokens: Mapping[Stack, int], solved: bool) -> float:
    """Operations of the walk over all blocks."""
    return sum(
        blocks(config, stack, range(num_layers(config, stack)), tokens, solved) for stack in STACKS
    )


def _matrices(config: SwitchConfig) -> int:
    return len(expert_matrices(config))
