# SPDX-License-Identifier: Apache-2.0
"""Samples: corrupted, flat, reproducible, counted; and the tokens that Hessians count."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SENTENCES, sentencepiece_model

from qmoe_jax.calibration import data, tokenizer


def load_tiny(folder, extra_ids):
    path = folder / f"{extra_ids}.model"
    path.write_bytes(sentencepiece_model())
    return tokenizer.load_tokenizer(path, extra_ids)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("tokenizer"), 32)


def arrays(samples):
    return [
        getattr(samples, field.name)
        for field in dataclasses.fields(samples)
        if field.name != "counts"
    ]


def restore(sample, tokenizer):
    """Puts each span of the targets in its sentinel's place in the inputs."""
    spans, sentinel = {}, None
    for token in sample.decoder_target_tokens[:-1]:
        if token >= tokenizer.lowest_sentinel_id:
            sentinel = token
            spans[sentinel] = []
        else:
            spans[sentinel].append(token)
    kept = sample.encoder_input_tokens[:-1]
    return [t for token in kept for t in spans.get(token, [token])]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**33),
    num_samples=st.integers(1, 20),  # no more than the first 128 documents, joined, give
    inputs_length=st.sampled_from([16, 64, 128]),
    document_mode=st.sampled_from(["skip", "split"]),
)
def test_samples_restore_the_text(tiny, seed, num_samples, inputs_length, document_mode):
    samples = data.make_samples(
        SENTENCES,
        tiny,
        num_samples,
        seed=seed,
        inputs_length=inputs_length,
        document_mode=document_mode,
        shuffle=False,
    )
    assert len(samples) == num_samples
    restored = [restore(sample, tiny) for sample in samples]
    assert samples.counts.raw_tokens == sum(map(len, restored))
    encoded = [tiny.encode(text).tolist() for text in SENTENCES]
    if document_mode == "skip":
        remaining = iter(encoded)  # `in` consumes it: the documents come in order
        assert all(tokens in remaining for tokens in restored)
    else:
        joined = [token for tokens in encoded[:128] for token in tokens]
        assert [token for tokens in restored for token in tokens] == joined[
            : samples.counts.raw_tokens
        ]
    assert samples.encoder_lengths.max() <= inputs_length


def test_a_sample_ends_in_eos_and_its_decoder_inputs_are_shifted(tiny):
    samples = data.make_samples(SENTENCES, tiny, 20, seed=0, inputs_length=128)
    for sample in samples:
        assert sample.encoder_input_tokens[-1] == sample.decoder_target_tokens[-1] == tiny.eos_id
        assert sample.decoder_input_tokens[0] == tiny.pad_id
        np.testing.assert_array_equal(
            sample.decoder_input_tokens[1:], sample.decoder_target_tokens[:-1]
        )
        assert sample.decoder_target_tokens[0] == tiny.first_sentinel_id
    assert all(a.dtype == np.int32 for a in arrays(samples)[:3])


def test_full_length_samples_have_512_inputs_and_114_targets(tiny):
    samples = data.make_samples(SENTENCES, tiny, 5, seed=0, document_mode="split")
    assert samples.encoder_lengths.tolist() == [512] * 5
    assert samples.decoder_lengths.tolist() == [114] * 5
    assert samples.counts.raw_tokens == 5 * 568


def test_indexing_gives_views_of_each_sample(tiny):
    samples = data.make_samples(SENTENCES, tiny, 12, seed=0, inputs_length=128)
    assert np.shares_memory(samples[3].encoder_input_tokens, samples.encoder_input_tokens)
    assert [s.encoder_input_tokens.size for s in samples] == samples.encoder_lengths.tolist()
    assert [s.decoder_input_tokens.size for s in samples] == samples.decoder_lengths.tolist()
    np.testing.assert_array_equal(
        samples[-1].decoder_input_tokens, samples[11].decoder_input_tokens
    )
    with pytest.raises(IndexError):
        samples[12]
    again = data.stack_samples(list(samples), samples.counts)
    for ours, theirs in zip(arrays(samples), arrays(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_sample_is_made_again_from_seed_and_index_alone(tiny):
    samples = data.make_samples(SENTENCES, tiny, 30, seed=5, inputs_length=128, shuffle=False)
    for index in (0, 7, 29):
        raw = np.asarray(restore(samples[index], tiny), np.int32)
        sample = data.make_sample(raw, tiny, seed=5, index=index)
        for ours, theirs in zip(arrays(sample), arrays(samples[index]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_noise_differs_between_samples_and_seeds(tiny):
    raw = tiny.encode(" ".join(SENTENCES[:10]))[:100]
    inputs = {
        data.make_sample(raw, tiny, seed=seed, index=index).encoder_input_tokens.tobytes()
        for seed in range(5)
        for index in range(10)
    }
    assert len(inputs) == 50


@pytest.mark.parametrize("shuffle", [False, True])
def test_same_seed_same_samples(tiny, shuffle):
    def made(seed):
        return data.make_samples(SENTENCES, tiny, 40, seed=seed, shuffle=shuffle)

    assert data.fingerprint(made(1)) == data.fingerprint(made(1))
    assert data.fingerprint(made(1)) != data.fingerprint(made(2))


def test_shuffling_draws_other_documents(tiny):
    def drawn(shuffle):
        samples = data.make_samples(SENTENCES, tiny, 40, seed=0, shuffle=shuffle)
        return [tuple(map(int, restore(sample, tiny))) for sample in samples]

    encoded = [tuple(tiny.encode(text).tolist()) for text in SENTENCES]
    assert drawn(False) == [tokens for tokens in encoded if len(tokens) > 1][:40]
    assert set(drawn(True)) <= set(encoded)
    assert drawn(True) != drawn(False)


def test_counts_of_what_was_read(tiny):
    long = " ".join(SENTENCES[:60])
    texts = ["", long, "A class.", "", "A function.", long, "never read"]
    samples = data.make_samples(texts, tiny, 2, seed=0, shuffle=False)
    tokens = tiny.encode("A class.").size + tiny.encode("A function.").size
    assert samples.counts == data.CorpusCounts(
        documents_read=5, too_long=1, too_short=2, raw_tokens=tokens
    )


def test_fingerprint_sees_every_array(tiny):
    samples = data.make_samples(SENTENCES, tiny, 4, seed=0)
    prints = {data.fingerprint(samples)}
    for field in dataclasses.fields(samples):
        if field.name == "counts":
            continue
        changed = getattr(samples, field.name).copy()
        changed[-1] += 1
        prints.add(data.fingerprint(dataclasses.replace(samples, **{field.name: changed})))
    assert len(prints) == 6
    uncounted = dataclasses.replace(samples, counts=data.CorpusCounts())
    assert data.fingerprint(uncounted) == data.fingerprint(samples)


def test_masks_leave_out_sentinels_and_what_predicts_them():
    sample = data.Sample(
        encoder_input_tokens=np.asarray([5, 99, 6, 98, 1], np.int32),
        decoder_input_tokens=np.asarray([0, 99, 7, 8, 98, 9], np.int32),
        decoder_target_tokens=np.asarray([99, 7, 8, 98, 9, 1], np.int32),
    )
    encoder, decoder = data.calibration_masks(data.stack_samples([sample, sample]), 90)
    assert encoder.tolist() == [True, False, True, False, True] * 2
    assert decoder.tolist() == [False, True, True, False, True, True] * 2


def test_masks_are_the_published_ones(data_dir):
    golden = np.load(data_dir / "qmoe" / "calibration_masks.npz")
    encoder = np.split(golden["encoder"], np.cumsum(golden["encoder_lengths"])[:-1])
    decoder = np.split(golden["decoder"], np.cumsum(golden["decoder_lengths"])[:-1])
    # Published decoder inputs end with a sentinel that predicts nothing. Any sentinel as its target
    # leaves it out, as the published rule for a last position does.
    samples = data.stack_samples(
        [data.Sample(e, d, np.append(d[1:], d[-1])) for e, d in zip(encoder, decoder, strict=True)]
    )
    masks = data.calibration_masks(samples, int(golden["lowest_sentinel_id"]))
    np.testing.assert_array_equal(masks[0], golden["encoder_keep"])
    np.testing.assert_array_equal(masks[1], golden["decoder_keep"])


def test_too_little_text(tiny):
    with pytest.raises(ValueError, match=r"gave 2 of the 3 samples wanted: of 3 documents 0 had"):
        data.make_samples(["A class.", "", "A function."], tiny, 3, seed=0)
    with pytest.raises(ValueError, match=r"1 had more than 568 tokens .* `document_mode` to"):
        data.make_samples([" ".join(SENTENCES)], tiny, 1, seed=0)


def test_too_few_sentinels(tmp_path):
    with pytest.raises(ValueError, match="512 needs 28 sentinels, but the tokenizer has 27"):
        data.make_samples(SENTENCES, load_tiny(tmp_path, 27), 1, seed=0)
    data.make_samples(SENTENCES, load_tiny(tmp_path, 28), 1, seed=0)


def test_no_samples_wanted(tiny):
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, not 0"):
        data.make_samples(SENTENCES, tiny, 0, seed=0)


def test_no_samples_to_stack():
    with pytest.raises(ValueError, match="at least one sample"):
        data.stack_samples([])
