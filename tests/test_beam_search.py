# SPDX-License-Identifier: Apache-2.0
"""Beam search against plain NumPy over whole forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stores
import tiny_switch
from flax.traverse_util import unflatten_dict
from test_decoding import original, prompts
from tiny_stores import Kind

from qmoe_jax.checkpoints import source
from qmoe_jax.inference import decoding, load
from qmoe_jax.inference.beam_search import NO_BEAM, Beams, beam_search
from qmoe_jax.inference.model import Model
from qmoe_jax.models.switch import Switch

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAME = "tiny_switch_base"


def log_probs(model, prompt, sequences):
    """Of every next token after each of some sequences, by a whole forward pass."""
    count, length = sequences.shape
    # Tokens after them change nothing; without, the pass would take a last 0 for padding.
    inputs = np.ones((max(4, count), 8), np.int32)
    inputs[:, 0] = 0
    inputs[:count, 1 : length + 1] = sequences
    everything = np.repeat(prompt[None], len(inputs), 0), inputs, np.ones_like(inputs)
    logits = tiny_switch.logits(model.module, model.variables, *everything)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)[:count, length]


def brevity(length, alpha):
    return ((5 + length) / 6) ** alpha


def searched(model, prompt, length, K, alpha, eos_id):
    """The K best (score, tokens) of one prompt; live and finished beams in plain lists."""
    live, finished = [(0.0, ())], []
    for position in range(length):
        after = log_probs(
            model, prompt, np.array([s for _, s in live], np.int32).reshape(len(live), position)
        )
        grown = [
            (total + row[token], (*sequence, token))
            for (total, sequence), row in zip(live, after, strict=True)
            for token in range(row.size)
        ]
        best = sorted(grown, reverse=True)[: 2 * K]
        finished += [(s / brevity(position + 1, alpha), t) for s, t in best if t[-1] == eos_id]
        finished = sorted(finished, reverse=True)[:K]
        live = [(s, t) for s, t in best if t[-1] != eos_id][:K]
    return finished or live


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_like_plain_numpy(alpha):
    model, length, K = original(NAME), 5, 3
    tokens = prompts(model)
    free, _ = decoding.generate(model, tokens, length, eos_id=-1)
    eos_id = int(free[0, 2])
    found, scores = beam_search(model, tokens, length, beams=Beams(K, alpha), eos_id=eos_id)
    for row, prompt in enumerate(tokens):
        expected = searched(model, prompt, length, K, alpha, eos_id)
        for k, (score, sequence) in enumerate(expected):
            assert scores[row, k] == pytest.approx(score, abs=1e-4)
            np.testing.assert_array_equal(found[row, k, : len(sequence)], sequence)
            assert not found[row, k, len(sequence) :].any()
        assert (scores[row, len(expected) :] == NO_BEAM).all()


def test_wide_enough_it_finds_the_best_of_all():
    model = original(NAME)
    (prompt,) = tokens = prompts(model)[:1]
    V, eos_id, alpha = model.config.vocab_size, 7, 0.6
    found, scores = beam_search(model, tokens, 2, beams=Beams(V, alpha), eos_id=eos_id)
    first = log_probs(model, prompt, np.zeros((1, 0), np.int32))[0]
    second = log_probs(model, prompt, np.arange(V, dtype=np.int32)[:, None])[:, eos_id]
    expected = (first + second) / brevity(2, alpha)
    expected[eos_id] = first[eos_id] / brevity(1, alpha)
    assert found[0, 0, 0] == np.argmax(expected)
    ended = scores[0] > NO_BEAM
    assert ended.sum() > 10
    np.testing.assert_allclose(scores[0, ended], expected[found[0, ended, 0]], atol=1e-4)


def test_one_beam_without_penalty_is_greedy():
    """Where greedy ends by itself; a beam also keeps what ended on the way."""
    model, length = original(NAME), 8
    tokens = prompts(model)
    free, _ = decoding.generate(model, tokens, length, eos_id=-1)
    eos_id = int(free[1, 0])
    greedy, log_prob = decoding.generate(model, tokens[1:2], length, eos_id=eos_id)
    found, scores = beam_search(model, tokens[1:2], length, beams=Beams(1, 0.0), eos_id=eos_id)
    np.testing.assert_array_equal(found[:, 0], greedy)
    np.testing.assert_allclose(scores[:, 0], log_prob, atol=1e-5)


def test_a_row_that_never_ends_gives_what_is_alive():
    model = original(NAME)
    tokens = prompts(model)
    found, scores = beam_search(model, tokens, 4, beams=Beams(2), eos_id=-1)
    greedy, log_prob = decoding.generate(model, tokens, 4, eos_id=-1)
    assert (scores[:, 0] >= log_prob - 1e-4).all()
    assert (np.diff(scores) <= 0).all()
    assert found.shape == (3, 2, 4)
    assert greedy.shape == (3, 4)


def test_packed_beams_are_those_of_dequantized_weights(tmp_path):
    tiny_stores.write(tmp_path / "store", Kind("qmoe"))
    model = load.load(tmp_path / "store")
    flat = source.all_params(source.open_source(tmp_path / "store"))
    params = {name: jnp.asarray(array, jnp.float32) for name, array in flat.items()}
    dense = Model(Switch(model.config), {"params": unflatten_dict(params, sep="/")})
    tokens = prompts(model)
    # Of 11 tokens: more beams than the first position has sequences.
    found, scores = beam_search(model, tokens, 4, beams=Beams(16), eos_id=3)
    expected, expected_scores = beam_search(dense, tokens, 4, beams=Beams(16), eos_id=3)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


def test_places_that_hold_no_sequence_are_empty():
    """One position, no end: as many sequences as there are tokens."""
    model = original(NAME)
    V = model.config.vocab_size
    found, scores = beam_search(model, prompts(model), 1, beams=Beams(V + 3), eos_id=-1)
    assert (scores[:, :V] > NO_BEAM).all()
    assert (scores[:, V:] == NO_BEAM).all() and not found[:, V:].any()
    assert all(sorted(row) == list(range(V)) for row in found[:, :V, 0].tolist())


def test_beams_that_cannot_be():
    with pytest.raises(ValueError, match="num_decodes 0"):
        Beams(0)
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected at least one beam, and an alpha"):
            Beams(2, alpha)
