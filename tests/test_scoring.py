# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
from test_decoding import NAMES, original, prompts

from qmoe_jax.inference import decoding, scoring
from qmoe_jax.inference.decoding import Sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_sums_of_log_softmax(name):
    model = original(name)
    inputs, shifted, targets = tiny_switch.tokens(name, "pad")
    logits = np.asarray(
        tiny_switch.logits(model.module, model.variables, inputs, shifted, targets), np.float64
    )
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [
        sum(row[position, token] for position, token in enumerate(tokens) if token)
        for row, tokens in zip(log_probs, np.asarray(targets), strict=True)
    ]
    found = scoring.score(model, np.asarray(inputs), np.asarray(targets))
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-5)


def test_what_was_generated_scores_as_it_was_generated():
    model = original("tiny_switch_base")
    tokens = prompts(model)
    found, log_prob = decoding.generate(model, tokens, 6, sampling=Sampling(), eos_id=-1)
    assert (found > 0).all()
    np.testing.assert_allclose(scoring.score(model, tokens, found), log_prob, atol=1e-4)


def test_ids_outside_of_the_vocabulary_are_refused():
    model = original("tiny_switch_base")
    tokens = prompts(model)
    wrong = tokens - 3  # padding becomes negative
    with pytest.raises(ValueError, match="`decoder_target_tokens` holds ids from -3 to"):
        scoring.score(model, tokens, wrong)


def test_padding_counts_nothing():
    model = original("tiny_switch_base")
    tokens, targets = prompts(model), jnp.asarray(prompts(model, seed=4)[:, :5])
    longer = jnp.pad(targets, ((0, 0), (0, 3)))
    short, padded = (scoring.score(model, tokens, np.asarray(t)) for t in (targets, longer))
    np.testing.assert_allclose(short, padded, atol=1e-4)
