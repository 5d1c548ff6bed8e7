# SPDX-License-Identifier: Apache-2.0
import pytest
import tiny_switch

from qmoe_jax.models.config import STACKS, num_layers, sparse_layers
from qmoe_jax.runs import work


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_the_parts_of_a_run_add_up_to_the_whole(name, solved):
    config = tiny_switch.config(name)
    tokens = {"encoder": 1000, "decoder": 300}
    total = 0.0
    for stack in STACKS:
        for layer in range(num_layers(config, stack)):
            sparse = layer in sparse_layers(config, stack)
            total += work.dense_part(config, stack, sparse, tokens[stack])
            if sparse:  # in two groups of experts
                total += work.expert_group(config, 3, tokens[stack] // 2, solved)
                total += work.expert_group(config, 5, tokens[stack] // 2, solved)
    assert total == pytest.approx(work.whole_run(config, 1000, 300, solved))
