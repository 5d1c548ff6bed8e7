# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import tiny_training

from qmoe_jax.calibration import tokenizer
from qmoe_jax.calibration.data import Sample
from qmoe_jax.training import batches
from qmoe_jax.training.batches import Lengths


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_training.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def vocabulary(text):
    return tokenizer.load_tokenizer(text.sentencepiece_model_file)


@pytest.fixture
def corpus(text, tmp_path):
    """Writes documents and returns the options that read them."""

    def write(*documents: str, **changes):
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return dataclasses.replace(text, files=str(path), **changes)

    return write


def take(text, vocabulary, number: int, first: int = 0) -> list[Sample]:
    return list(itertools.islice(batches.training_samples(text, vocabulary, first), number))


def same(left: Sample, right: Sample) -> bool:
    return np.array_equal(left.encoder_input_tokens, right.encoder_input_tokens) and (
        np.array_equal(left.decoder_target_tokens, right.decoder_target_tokens)
    )


def raw_tokens(sample: Sample, vocabulary) -> Counter[int]:
    """The text's tokens, on whichever side they are."""
    both = np.concatenate([sample.encoder_input_tokens, sample.decoder_target_tokens])
    return Counter(both[(both > 1) & (both < vocabulary.lowest_sentinel_id)].tolist())


DOCUMENTS = tuple(f"the values {n} to {2 * n} of a list, and those of a tuple" for n in range(40))


def test_a_stream_can_be_entered_at_any_sample(corpus, vocabulary):
    text = corpus(*DOCUMENTS)
    whole = take(text, vocabulary, 90)
    for first in (1, 29, 64):  # within, near and beyond the first epoch
        assert all(map(same, take(text, vocabulary, 90 - first, first), whole[first:]))


def test_each_epoch_has_all_text_in_its_own_order_and_noise(corpus, vocabulary):
    whole = {"document_mode": "skip", "task_feature_lengths": {"inputs": 64}}
    text = corpus(*DOCUMENTS, **whole)
    samples = take(text, vocabulary, 80)
    epochs = [
        [tuple(sorted(raw_tokens(sample, vocabulary).items())) for sample in samples[start:][:40]]
        for start in (0, 40)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    masked = [{s.decoder_target_tokens.tobytes() for s in samples[n:][:40]} for n in (0, 40)]
    assert masked[0] != masked[1]
    other = take(corpus(*DOCUMENTS, **whole, seed=1), vocabulary, 40)
    assert not all(map(same, other, samples))


def test_split_text_loses_no_token(corpus, vocabulary):
    text = corpus(*DOCUMENTS)
    tokens = Counter(np.concatenate(vocabulary.encode_batch(DOCUMENTS)).tolist())
    raw = batches.lengths(text).raw_tokens
    samples = take(text, vocabulary, -(-tokens.total() // raw))
    found = sum((raw_tokens(sample, vocabulary) for sample in samples), Counter())
    assert found == Counter({token: n for token, n in tokens.items() if token > 1})


def test_text_without_a_sample_is_an_error(corpus, vocabulary):
    for documents in ((), ("", " ")):
        expected = f"gave no sample: of {len(documents)} documents 0 had more"
        with pytest.raises(ValueError, match=expected):
            take(corpus(*documents), vocabulary, 1)
    long = corpus("one two three " * 200, document_mode="skip")
    with pytest.raises(ValueError, match=r"of 1 documents 1 had more.*DOCUMENT_MODE='split'"):
        take(long, vocabulary, 1)


def test_batches_are_padded_to_the_lengths_asked_for(text, vocabulary):
    assert batches.lengths(text).targets < 20
    text = dataclasses.replace(text, task_feature_lengths={"inputs": 24, "targets": 20})
    shape = batches.lengths(text)
    assert (shape.inputs, shape.targets) == (24, 20)
    samples = take(text, vocabulary, 7)
    first, last = batches.batched(samples, 4, shape)
    assert first.encoder_input_tokens.shape == last.encoder_input_tokens.shape == (4, 24)
    assert first.decoder_target_tokens.shape == last.decoder_input_tokens.shape == (4, 20)
    for number, sample in enumerate(samples):
        row = (first, last)[number // 4]
        for name in row._fields:
            tokens, padded = getattr(sample, name), getattr(row, name)[number % 4]
            np.testing.assert_array_equal(padded[: tokens.size], tokens)
            assert not padded[tokens.size :].any()
    assert not any(tokens[3].any() for tokens in last)
    assert all(tokens.dtype == np.int32 for tokens in last)


def test_more_noise_masks_more_of_a_longer_text(text, vocabulary):
    noisy = dataclasses.replace(text, noise_density=0.5, mean_noise_span_length=5.0)
    usual, shape = batches.lengths(text), batches.lengths(noisy)
    assert shape.inputs == usual.inputs
    assert shape.targets > 2 * usual.targets and shape.raw_tokens > 1.3 * usual.raw_tokens
    masked = [
        np.mean([sample.decoder_target_tokens.size for sample in take(options, vocabulary, 20)])
        for options in (text, noisy)
    ]
    assert masked[1] > 2 * masked[0]
    first, *_ = batches.batched(take(noisy, vocabulary, 8), 8, shape)
    assert first.decoder_target_tokens[:, -1].any() and first.encoder_input_tokens[:, -1].any()
    short = dataclasses.replace(noisy, task_feature_lengths={"inputs": 24, "targets": 8})
    with pytest.raises(ValueError, match=r"has targets 8, .* with NOISE_DENSITY 0.5: leave"):
        batches.lengths(short)


def test_a_stream_is_read_no_further_than_asked(text, vocabulary):
    endless = batches.training_samples(text, vocabulary)
    stream = batches.batched(endless, 5, Lengths(24, 8, 26))
    assert len(next(stream).encoder_input_tokens) == 5
    taken = take(text, vocabulary, 6)
    assert same(next(endless), taken[5])


def test_training_cuts_documents_unless_told_otherwise(text):
    assert text.document_mode == "split"
