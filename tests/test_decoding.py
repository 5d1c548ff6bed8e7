# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stores
import tiny_switch
from flax.traverse_util import unflatten_dict
from tiny_stores import Kind

from qmoe_jax.checkpoints import source
from qmoe_jax.inference import decoding, load
from qmoe_jax.inference.decoding import GREEDY, Sampling
from qmoe_jax.inference.model import Model
from qmoe_jax.models.switch import Switch

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ["tiny_switch_base", "tiny_switch_xxl", "tiny_switch_c"]


def original(name) -> Model:
    return Model(Switch(tiny_switch.config(name)), {"params": tiny_switch.params(name)})


def prompts(model, rows=3, seed=0):
    """Of different lengths."""
    tokens = np.random.default_rng(seed).integers(2, model.config.vocab_size, (rows, 16))
    tokens[1, 9:] = 0
    return tokens.astype(np.int32)


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_a_cache_are_those_without(name):
    """Gated and plain experts, tied and untied logits; at every position."""
    model, length = original(name), 7
    tokens = prompts(model)
    inputs = np.random.default_rng(1).integers(2, model.config.vocab_size, (3, length))
    inputs = inputs.astype(np.int32)
    inputs[:, 0] = 0
    everything = (tokens, inputs, np.ones_like(inputs))
    expected = np.asarray(tiny_switch.logits(model.module, model.variables, *everything))
    cache = decoding.start(model, tokens, length).cache
    step = tiny_switch.quick_jit(
        lambda *given: model.module.apply(model.variables, *given, method="step")
    )
    valid = jnp.ones(3, bool)
    for position in range(length):
        logits, cache = step(jnp.asarray(inputs[:, position]), cache, jnp.int32(position), valid)
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES[:2])
def test_every_token_is_the_likeliest_under_teacher_forcing(name):
    """The whole model, given what was decoded, prefers just that, and finds it as likely."""
    model = original(name)
    tokens = prompts(model)
    found, log_prob = decoding.generate(model, tokens, 6, eos_id=-1)
    # A whole forward pass takes a token 0 for padding.
    rows = (found > 0).all(1)
    assert rows.any()
    tokens, found, log_prob = tokens[rows], found[rows], log_prob[rows]
    inputs = np.pad(found, ((0, 0), (1, 0)))[:, :-1]
    logits = tiny_switch.logits(model.module, model.variables, tokens, inputs, np.ones_like(found))
    np.testing.assert_array_equal(np.argmax(np.asarray(logits), axis=-1), found)
    likeliest = jax.nn.log_softmax(logits, axis=-1).max(-1).sum(1)
    np.testing.assert_allclose(log_prob, likeliest, atol=1e-4)


def test_a_row_ends_at_its_eos_and_the_others_go_on():
    model = original("tiny_switch_base")
    tokens, key = prompts(model, 2), jax.random.key(1)
    sampled = {"sampling": Sampling(), "key": key}
    free, _ = decoding.generate(model, tokens, 8, **sampled, eos_id=-1)
    eos_id = int(free[0, 2])  # what the first row says third
    assert eos_id > 0
    ended, _ = decoding.generate(model, tokens, 8, **sampled, eos_id=eos_id)
    for row, whole in zip(ended, free, strict=True):
        places = np.flatnonzero(whole == eos_id)
        stop = places[0] + 1 if places.size else 8
        np.testing.assert_array_equal(row[:stop], whole[:stop])
        assert not row[stop:].any()
    assert ended[0, 2] == eos_id


def test_a_row_is_decoded_as_if_it_were_alone():
    model = original("tiny_switch_base")
    tokens = prompts(model)
    together, log_probs = decoding.generate(model, tokens, 6, eos_id=-1)
    for row, length in enumerate((16, 9, 16)):
        alone, log_prob = decoding.generate(model, tokens[row : row + 1, :length], 6, eos_id=-1)
        np.testing.assert_array_equal(alone[0], together[row])
        np.testing.assert_allclose(log_prob[0], log_probs[row], atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(topk=3)], ids=str)
def test_a_stream_is_what_is_generated(sampling):
    model = original("tiny_switch_base")
    tokens, key = prompts(model, 2), jax.random.key(3)
    free, _ = decoding.generate(model, tokens, 6, sampling=sampling, key=key, eos_id=-1)
    eos_id = int(free[0, 3])
    whole, _ = decoding.generate(model, tokens, 6, sampling=sampling, key=key, eos_id=eos_id)
    pieces = list(decoding.stream(model, tokens, 6, sampling=sampling, key=key, eos_id=eos_id))
    np.testing.assert_array_equal(np.stack(pieces, 1), whole[:, : len(pieces)])
    again = list(decoding.stream(model, tokens, 6, sampling=sampling, key=key, eos_id=eos_id))
    np.testing.assert_array_equal(again, pieces)  # the key is still the caller's
    assert not whole[:, len(pieces) :].any()


@pytest.mark.parametrize(
    "kind",
    [
        Kind("qmoe"),
        Kind("qmoe", config=tiny_stores.GATED),
        Kind("tunstall"),
        Kind("uniform", bits=3),
    ],
    ids=str,
)
def test_packed_generation_is_dequantized_generation(kind, tmp_path):
    tiny_stores.write(tmp_path / "store", kind)
    packed = load.load(tmp_path / "store")
    flat = source.all_params(source.open_source(tmp_path / "store"))
    params = unflatten_dict({k: jnp.asarray(a) for k, a in flat.items()}, sep="/")
    dense = Model(Switch(packed.config), {"params": params})
    tokens = prompts(packed)
    (found, log_prob), (expected, wanted) = (
        decoding.generate(model, tokens, 12, eos_id=-1) for model in (packed, dense)
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(log_prob, wanted, rtol=1e-4, atol=1e-4)


LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.2, 0.6]]))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.25, 0.09, 0.0225, 0.0025]),
        (Sampling(temperature=0.5, topp=0.6), [1, 0, 0, 0]),  # divided first, then cut
        (Sampling(topk=2), [0.5, 0.3, 0, 0]),
        (Sampling(topk=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(topp=0.5), [1, 0, 0, 0]),
        (Sampling(topp=0.51), [0.5, 0.3, 0, 0]),
        (Sampling(topp=0.9), [0.5, 0.3, 0.15, 0]),
        (Sampling(topp=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(topk=1), [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should(sampling, expected):
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: decoding.choose(LOGITS, decoding.under_jit(sampling), key))(keys)
    counts = np.bincount(np.asarray(drawn[:, 0]), minlength=4) / len(keys)
    expected = np.array(expected) / np.sum(expected)
    np.testing.assert_allclose(counts, expected, atol=0.02)
    assert not counts[expected == 0].any()


def test_ids_outside_of_the_vocabulary_are_refused_at_once():
    model = original("tiny_switch_base")
    tokens = prompts(model)
    tokens[0, 0] = model.config.vocab_size
    for decode in (decoding.generate, decoding.stream):
        with pytest.raises(ValueError, match=rf"ids from 0 to {model.config.vocab_size}; this"):
            decode(model, tokens, 4)


def test_the_coldest_sampling_is_greedy():
    for sampling in (GREEDY, Sampling(topk=1), Sampling(temperature=1e-6)):
        assert decoding.choose(
            LOGITS, decoding.under_jit(sampling), jax.random.key(5)
        ).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("temperature", "topk", "topp"), [(-1.0, 0, 0.0), (1.0, 0, 1.5), (1.0, 2, 0.5), (1.0, -1, 0.0)]
)
def test_sampling_that_cannot_be(temperature, topk, topp):
    with pytest.raises(ValueError, match="topk"):
        Sampling(temperature, topk, topp)


def test_another_temperature_needs_no_other_program():
    model = original("tiny_switch_base")
    tokens, key = prompts(model), jax.random.key(2)
    decoding.generate(model, tokens, 4, sampling=Sampling(temperature=0.5, topp=0.5), key=key)
    programs: Any = decoding._run
    compiled = programs._cache_size()
    found = [
        decoding.generate(model, tokens, 4, sampling=Sampling(temperature=t, topp=p), key=key)[0]
        for t, p in ((5.0, 0.999), (1e-4, 0.5))
    ]
    assert programs._cache_size() == compiled
    assert (found[0] != found[1]).any()
    np.testing.assert_array_equal(found[1], decoding.generate(model, tokens, 4)[0])
