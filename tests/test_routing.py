# SPDX-License-Identifier: Apache-2.0
"""Groups, capacities and drops: against the numbers that T5X recorded, and plain loops."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.models import routing

CONFIG = tiny_switch.config("tiny_switch_base")  # 8 experts, capacity factors 1.25 and 2, minimum 4


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_plans_are_those_of_t5x(name):
    for case, layers in tiny_switch.routing(name).items():
        token_set, capacity = case.split(".")
        inputs, targets, _ = tiny_switch.tokens(name, token_set)
        config = tiny_switch.config(name, capacity)
        for layer, wanted in layers.items():
            tokens = inputs if layer.startswith("encoder") else targets
            batch, length = tokens.shape
            plan = routing.routing_plan(config, batch, length, "t5x")
            got = {
                "num_groups": plan.num_groups,
                "tokens_per_group": plan.tokens_per_group,
                "capacity": plan.capacity,
            }
            assert got == {key: wanted[key] for key in got}, (case, layer)


@pytest.mark.parametrize(
    ("batch", "length", "pads"),
    [
        (4, 6, (0, 0)),  # 24 tokens: nothing to add
        (3, 7, (0, 1)),  # a column of 3 tokens rather than 5 rows of 7
        (7, 3, (1, 0)),  # a row of 3 rather than 5 columns of 7
        (3, 3, (0, 5)),  # 15 tokens either way: columns
        (1, 1, (0, 7)),
    ],
)
def test_padding_adds_the_fewest_tokens(batch, length, pads):
    plan = routing.routing_plan(CONFIG, batch, length, "t5x")
    assert (plan.pad_batch, plan.pad_length) == pads
    padded = (batch + plan.pad_batch) * (length + plan.pad_length)
    assert plan.num_groups * plan.tokens_per_group == padded


def test_large_batches_are_cut_into_smaller_groups():
    config = dataclasses.replace(CONFIG, group_size=100)
    plan = routing.routing_plan(config, 30, 32, "t5x")  # 960 tokens: 8 groups of 120 are too large
    assert (plan.num_groups, plan.tokens_per_group) == (16, 60)


def test_capacity_factors_and_rounding():
    def capacity(tokens, training=False, **changes):
        config = dataclasses.replace(CONFIG, min_expert_capacity=1, **changes)
        return routing.routing_plan(config, 8, tokens, "t5x", training=training).capacity

    assert (capacity(64), capacity(64, training=True)) == (16, 10)
    assert [capacity(tokens) for tokens in (10, 14, 2, 1)] == [2, 4, 1, 1]  # 2.5 and 3.5: to even
    assert capacity(64, eval_capacity_factor=0.01) == 1


def test_without_capacity_all_tokens_are_one_group():
    assert routing.routing_plan(CONFIG, 3, 7, "none") == (0, 0, 1, 21, None)


jitted_rank = tiny_switch.quick_jit(routing.rank_within_expert, static_argnums=1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=40, max_size=40))
def test_rank_counts_earlier_tokens_of_the_expert(chosen):
    got = jitted_rank(jnp.asarray(chosen), 8)
    np.testing.assert_array_equal(got, [chosen[:n].count(e) for n, e in enumerate(chosen)])


def test_ties_go_to_the_lowest_expert():
    prob = jnp.asarray([[[0.1, 0.45, 0.45], [1 / 3, 1 / 3, 1 / 3]]])
    index, chosen = routing.choose_experts(prob, None)
    np.testing.assert_array_equal(index, [[1, 0]])
    np.testing.assert_allclose(chosen, [[0.45, 1 / 3]])


def test_later_tokens_of_a_group_are_dropped():
    wanted = np.asarray([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    prob = jnp.where(jnp.asarray(wanted)[..., None] == jnp.arange(2)[None, None], 0.9, 0.1)
    index, chosen = routing.choose_experts(prob, 2)
    np.testing.assert_array_equal(index, [[0, 1, 1, 2, 0], [1, 1, 0, 0, 2]])
    np.testing.assert_allclose(chosen, np.full((2, 5), 0.9))


def test_load_balance_loss():
    """1 for even loads, E when one expert is certain for all tokens."""
    even = jnp.eye(4)[None]
    np.testing.assert_allclose(routing.load_balance_loss(even), 1.0)
    one = jnp.broadcast_to(jnp.eye(4)[:1], (3, 5, 4))
    np.testing.assert_allclose(routing.load_balance_loss(one), 4.0)


def test_router_z_loss():
    logits = jnp.log(jnp.asarray([[[1.0, 3.0], [2.0, 6.0]]]))
    np.testing.assert_allclose(
        routing.router_z_loss(logits), (np.log(4) ** 2 + np.log(8) ** 2) / 2, rtol=1e-6
    )
