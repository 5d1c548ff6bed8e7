# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from qmoe_jax.calibration import data, tokenizer
from qmoe_jax.inference import spans


@pytest.fixture(scope="module")
def vocabulary(request):
    folder = request.config.rootpath / "tests" / "data" / "text"
    return tokenizer.load_tokenizer(folder / "sentencepiece.model")


TEXT = "The compiler replaces every name by its value and removes what nobody reads"


def test_a_sample_filled_with_its_own_targets_is_the_text(vocabulary):
    sample = data.make_sample(vocabulary.encode(TEXT), vocabulary, seed=0, index=0)
    text = spans.filled(sample.encoder_input_tokens, sample.decoder_target_tokens, vocabulary)
    assert (
        text.count("[")
        == text.count("]")
        == len(spans.split(sample.decoder_target_tokens, vocabulary))
        - (vocabulary.first_sentinel_id not in sample.encoder_input_tokens)
    )
    letters = str.maketrans("", "", "[] ")
    assert text.translate(letters) == TEXT.translate(letters)


def test_gaps_without_an_answer_are_marked(vocabulary):
    first = vocabulary.first_sentinel_id
    inputs = np.array([first, *vocabulary.encode("and"), first - 1, vocabulary.eos_id], np.int32)
    targets = np.array([first, *vocabulary.encode("here"), vocabulary.eos_id], np.int32)
    assert spans.filled(inputs, targets, vocabulary) == "[here] and [...]"


def test_spans_end_at_eos_or_padding_and_only_the_first_of_a_number_counts(vocabulary):
    first = vocabulary.first_sentinel_id
    tokens = [5, first, 6, 7, first - 1, first, 8, vocabulary.eos_id, first - 2, 9]
    assert spans.split(tokens, vocabulary) == {0: [6, 7], 1: []}
    assert spans.split([first, 6, 0, first - 1], vocabulary) == {0: [6]}
