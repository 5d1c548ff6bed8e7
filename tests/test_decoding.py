# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch

from qmoe_jax.inference import decoding
from qmoe_jax.models.switch import Switch

EOS = 1


def greedy(name, tokens, length, eos_id=EOS):
    config, params = tiny_switch.config(name), tiny_switch.params(name)
    return decoding.greedy(config, params, tokens, length, eos_id=eos_id)


@pytest.mark.parametrize("name", ["tiny_switch_base", "tiny_switch_xxl"])
def test_every_token_is_the_likeliest_under_teacher_forcing(name):
    """The whole model, given what was decoded, prefers just that: tied and untied logits."""
    config, params = tiny_switch.config(name), tiny_switch.params(name)
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (3, 16)).astype(np.int32)
    tokens[1, 9:] = 0
    found = greedy(name, tokens, 6, eos_id=-1)
    inputs = np.pad(found, ((0, 0), (1, 0)))[:, :-1]
    arguments = (jnp.asarray(array) for array in (tokens, inputs, np.ones_like(found)))
    logits = Switch(config).apply({"params": params}, *arguments)
    np.testing.assert_array_equal(np.argmax(np.asarray(logits), axis=-1), found)


def test_a_row_ends_at_its_eos_and_the_others_go_on():
    name = "tiny_switch_base"
    vocab_size = tiny_switch.config(name).vocab_size
    tokens = np.random.default_rng(1).integers(2, vocab_size, (2, 16)).astype(np.int32)
    free = greedy(name, tokens, 8, eos_id=-1)
    eos_id = int(free[0, 2])  # what the first row says third
    ended = greedy(name, tokens, 8, eos_id=eos_id)
    for row, whole in zip(ended, free, strict=True):
        places = np.flatnonzero(whole == eos_id)
        stop = places[0] + 1 if places.size else 8
        np.testing.assert_array_equal(row[:stop], whole[:stop])
        assert not row[stop:].any()
    assert ended[0, 2] == eos_id


def test_shorter_output_is_the_beginning_of_a_longer_one():
    tokens = np.arange(2, 18, dtype=np.int32)[None]
    longer = greedy("tiny_switch_base", tokens, 6, eos_id=-1)
    np.testing.assert_array_equal(greedy("tiny_switch_base", tokens, 3, eos_id=-1), longer[:, :3])
