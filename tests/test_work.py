# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import tiny_switch

from qmoe_jax.models.config import STACKS, Stack, layer_shapes, num_layers, sparse_layers
from qmoe_jax.runs import work


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_the_parts_of_a_run_add_up_to_the_whole(name, solved):
    config = tiny_switch.config(name)
    tokens: dict[Stack, int] = {"encoder": 1000, "decoder": 300}
    total = 0.0
    for stack in STACKS:
        for layer in range(num_layers(config, stack)):
            sparse = layer in sparse_layers(config, stack)
            total += work.dense_part(config, stack, sparse, tokens)
            if sparse:  # in two groups of experts
                total += work.expert_group(config, 3, tokens[stack] // 2, solved)
                total += work.expert_group(config, 5, tokens[stack] // 2, solved)
    assert total == pytest.approx(work.whole_run(config, tokens, solved))


@pytest.mark.parametrize("name", tiny_switch.MODELS)
@pytest.mark.parametrize("stack", STACKS)
def test_a_dense_part_is_its_kernels_times_the_tokens_they_see(stack, name):
    """Keys and values of cross-attention are made of the encoder's tokens, all else of its own."""
    config = tiny_switch.config(name)
    tokens: dict[Stack, int] = {"encoder": 1000, "decoder": 300}
    for layer in range(num_layers(config, stack)):
        total = 0
        for path, shape in layer_shapes(config, stack, layer).items():
            if path.endswith("/kernel") and "/expert/" not in path:
                crossing = path.startswith("encoder_decoder_attention/")
                of_encoder = crossing and path.split("/")[1] in ("key", "value")
                seen = tokens["encoder" if of_encoder else stack]
                total += 2 * math.prod(shape) * seen
        sparse = layer in sparse_layers(config, stack)
        assert work.dense_part(config, stack, sparse, tokens) == total
