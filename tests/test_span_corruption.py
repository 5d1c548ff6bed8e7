# SPDX-License-Identifier: Apache-2.0
"""Span corruption against T5's figures, and the properties that define it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.calibration import span_corruption

FIRST_SENTINEL, NUM_SENTINELS, EOS = 32099, 100, 1

lengths = st.integers(2, 700)
densities = st.floats(0.01, 0.9)
mean_spans = st.floats(1.0, 20.0)
seeds = st.integers(0, 2**40)


def corrupt(tokens, noise_mask):
    return span_corruption.corrupt_spans(
        tokens,
        noise_mask,
        first_sentinel_id=FIRST_SENTINEL,
        num_sentinels=NUM_SENTINELS,
        eos_id=EOS,
    )


def restore(inputs, targets):
    """Puts each span of the targets in its sentinel's place in the inputs."""
    spans, sentinel = {}, None
    for token in targets[:-1]:
        if token > FIRST_SENTINEL - NUM_SENTINELS:
            sentinel = token
            spans[sentinel] = []
        else:
            spans[sentinel].append(token)
    return [t for token in inputs[:-1] for t in spans.get(token, [token])]


# Returned by T5 0.9.4's own random_spans_helper(inputs_length, density, mean_span, 1, 1).
@pytest.mark.parametrize(
    ("inputs_length", "density", "mean_span", "raw_tokens", "targets"),
    [
        (32, 0.15, 3.0, 34, 8),
        (64, 0.15, 3.0, 70, 14),
        (100, 0.15, 3.0, 110, 22),
        (128, 0.15, 3.0, 141, 29),
        (256, 0.15, 3.0, 284, 58),
        (512, 0.15, 3.0, 568, 114),
        (1024, 0.15, 3.0, 1137, 229),
        (114, 0.25, 5.0, 142, 44),
        (512, 0.25, 5.0, 639, 193),
        (512, 0.15, 1.0, 511, 155),
    ],
)
def test_lengths_are_t5s(inputs_length, density, mean_span, raw_tokens, targets):
    found = span_corruption.span_lengths(inputs_length, density, mean_span)
    assert found[:2] == (raw_tokens, targets)


# Counted in masks of T5 0.9.4's own random_spans_noise_mask(length, 0.15, seeds).
@pytest.mark.parametrize(
    ("length", "noise", "spans"),
    [(2, 1, 1), (9, 1, 1), (10, 2, 1), (30, 4, 1), (34, 5, 2), (100, 15, 5), (568, 85, 28)],
)
def test_noise_counts_are_t5s(length, noise, spans):
    assert span_corruption.noise_counts(length, 0.15, 3.0) == (noise, spans)


def test_corruption_of_a_given_mask_is_t5s():
    tokens = np.arange(100, 134, dtype=np.int32)
    noise_mask = np.array([c == "1" for c in "0000000000000000000000000111000011"])
    inputs, targets = corrupt(tokens, noise_mask)
    # T5 0.9.4's own noise_span_to_unique_sentinel on this mask, plus EOS.
    assert inputs.tolist() == [*range(100, 125), 32099, 128, 129, 130, 131, 32098, EOS]
    assert targets.tolist() == [32099, 125, 126, 127, 32098, 132, 133, EOS]


@settings(deadline=None)
@given(length=lengths, density=densities, mean_span=mean_spans, seed=seeds)
def test_mask_has_the_counts_and_starts_kept_and_ends_noisy(length, density, mean_span, seed):
    rng = span_corruption.noise_rng(seed, 0)
    mask = span_corruption.random_spans_mask(rng, length, density, mean_span)
    noise, spans = span_corruption.noise_counts(length, density, mean_span)
    assert mask.shape == (length,)
    assert not mask[0]
    assert mask[-1]
    assert mask.sum() == noise
    assert (np.diff(mask.astype(np.int8)) == 1).sum() == spans


@settings(deadline=None)
@given(length=lengths, seed=seeds, index=st.integers(0, 10**6))
def test_inputs_and_targets_restore_the_document(length, seed, index):
    tokens = np.random.default_rng(seed).integers(3, 32000, length).astype(np.int32)
    rng = span_corruption.noise_rng(seed, index)
    inputs, targets = corrupt(tokens, span_corruption.random_spans_mask(rng, length))
    assert restore(inputs, targets) == tokens.tolist()
    assert inputs[-1] == targets[-1] == EOS
    for side in (inputs, targets):
        sentinels = side[side > FIRST_SENTINEL - NUM_SENTINELS]
        _, spans = span_corruption.noise_counts(length, 0.15, 3.0)
        assert sentinels.tolist() == [FIRST_SENTINEL - i for i in range(spans)]


@settings(deadline=None, max_examples=50)
@given(inputs_length=st.integers(3, 200), density=densities, mean_span=mean_spans)
def test_lengths_hold_for_every_shorter_document(inputs_length, density, mean_span):
    raw_tokens, targets, spans = span_corruption.span_lengths(inputs_length, density, mean_span)
    counts = [
        (n, *span_corruption.noise_counts(n, density, mean_span)) for n in range(2, raw_tokens + 2)
    ]
    fitting, next_longer = counts[:-1], counts[-1]
    assert all(n - noise + s + 1 <= inputs_length for n, noise, s in fitting)
    assert all(noise + s + 1 <= targets and s <= spans for _, noise, s in fitting)
    n, noise, s = next_longer
    assert n - noise + s + 1 > inputs_length


def test_every_mask_is_about_equally_likely():
    # 7 kept and 3 noisy tokens in 2 spans: 6 ways times 2 ways.
    rng = np.random.default_rng(0)
    draws = [span_corruption.random_spans_mask(rng, 10, 0.3, 1.5) for _ in range(6000)]
    masks, counts = np.unique(np.stack(draws), axis=0, return_counts=True)
    assert len(masks) == 12
    assert counts.min() > 400
    assert counts.max() < 600


def test_noise_depends_on_seed_and_index_alone():
    def mask(seed, index):
        return span_corruption.random_spans_mask(span_corruption.noise_rng(seed, index), 568)

    np.testing.assert_array_equal(mask(7, 3), mask(7, 3))
    different = {mask(seed, index).tobytes() for seed in range(4) for index in range(50)}
    assert len(different) == 200


def test_corruption_leaves_the_document_alone():
    tokens = np.arange(10, dtype=np.int32)
    corrupt(tokens, tokens > 7)
    assert tokens.tolist() == list(range(10))


def test_too_few_sentinels():
    tokens, mask = np.arange(4, dtype=np.int32), np.array([False, True, False, True])
    with pytest.raises(ValueError, match="4 tokens needs 2 sentinels, but the tokenizer has 1"):
        span_corruption.corrupt_spans(
            tokens, mask, first_sentinel_id=99, num_sentinels=1, eos_id=EOS
        )


@pytest.mark.parametrize("length", [0, 1])
def test_too_short_to_corrupt(length):
    with pytest.raises(ValueError, match=f"at least 2 tokens, not {length}"):
        span_corruption.random_spans_mask(np.random.default_rng(0), length)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2,), "`inputs_length` must be at least 3"),
        ((512, 0.0), "`noise_density` must lie between 0 and 1, not be 0.0"),
        ((512, 1.0), "`noise_density` must lie between 0 and 1, not be 1.0"),
        ((512, 0.15, 0.5), "`mean_span` must be at least 1 token, not 0.5"),
    ],
)
def test_arguments_outside_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        span_corruption.span_lengths(*arguments)
