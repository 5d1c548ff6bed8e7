# SPDX-License-Identifier: Apache-2.0
"""T5's span corruption in NumPy: lengths, noise masks, sentinels."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


class SpanLengths(NamedTuple):
    """Lengths that fill `inputs_length` without padding."""

    raw_tokens: int  # of a document before corruption, without EOS
    targets: int  # of the decoder's targets, EOS included
    spans: int  # sentinels used


def span_lengths(
    inputs_length: int = 512,
    noise_density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN,
) -> SpanLengths:
    """Returns the longest document whose corrupted inputs, EOS included, fit `inputs_length`.

    512 gives 568 raw tokens and 114 targets (T5: data/preprocessors.py, random_spans_helper). Below
    about 10 tokens this counts the one span that the mask always has and T5's helper forgets; at
    density 0.5, T5 cuts the document by one more token to make inputs and targets equally long.

    Raises:
        ValueError: `inputs_length` below 3, or a density or span outside its range.
    """
    if not 0.0 < noise_density < 1.0:
        raise ValueError(f"`noise_density` must lie between 0 and 1, not be {noise_density}.")
    if mean_span < 1.0:
        raise ValueError(f"`mean_span` must be at least 1 token, not {mean_span}.")
    if inputs_length < 3:
        raise ValueError(
            f"`inputs_length` must be at least 3 (token, sentinel, EOS), not {inputs_length}."
        )

    def corrupted(raw_tokens: int) -> tuple[int, int, int]:
        noise, spans = noise_counts(raw_tokens, noise_density, mean_span)
        return raw_tokens - noise + spans + 1, noise + spans + 1, spans

    raw_tokens = 2
    while corrupted(raw_tokens + 1)[0] <= inputs_length:
        raw_tokens += 1
    _, targets, spans = corrupted(raw_tokens)
    return SpanLengths(raw_tokens, targets, spans)


def noise_counts(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Returns how many of `length >= 2` tokens are noise, and in how many spans.

    Rounds half to even in float64, as T5's helper and the published QMoE code do. (T5's mask rounds
    in float32: one token more or less at one length in a hundred, such as 190.)
    """
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, noise, length - noise)


def noise_rng(seed: int, index: int) -> np.random.Generator:
    """Returns the generator of sample `index`: the same whatever was drawn for other samples."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(index,))))


def random_spans_mask(
    rng: np.random.Generator,
    length: int,
    noise_density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN,
) -> Bool[np.ndarray, " length"]:
    """Returns a mask of spans, True for noise; it starts with kept tokens and ends with noise.

    All masks with the counts of `noise_counts` are equally likely (T5: data/preprocessors.py,
    random_spans_noise_mask, without its random roll).

    Raises:
        ValueError: `length` below 2: one token cannot be both kept and noise.
    """
    if length < 2:
        raise ValueError(f"span corruption needs at least 2 tokens, not {length}.")
    noise, spans = noise_counts(length, noise_density, mean_span)
    noise_lengths = _random_segmentation(rng, noise, spans)
    kept_lengths = _random_segmentation(rng, length - noise, spans)
    span_is_noise = np.tile([False, True], spans)
    return np.repeat(span_is_noise, np.stack([kept_lengths, noise_lengths], axis=1).ravel())


def _random_segmentation(
    rng: np.random.Generator, items: int, segments: int
) -> Int64[np.ndarray, " segments"]:
    """Cuts `items` into `segments` non-empty runs, every way equally likely; their lengths."""
    cuts = 1 + np.sort(rng.choice(items - 1, size=segments - 1, replace=False))
    return np.diff(cuts, prepend=0, append=items)


def corrupt_spans(
    tokens: Int32[np.ndarray, " raw_tokens"],
    noise_mask: Bool[np.ndarray, " raw_tokens"],
    *,
    first_sentinel_id: int,
    num_sentinels: int,
    eos_id: int,
) -> tuple[Int32[np.ndarray, " inputs"], Int32[np.ndarray, " targets"]]:
    """Returns inputs (each noise span one sentinel) and targets (each kept span one sentinel).

    Sentinels go down from `first_sentinel_id`, the n-th span having the same one on both sides; EOS
    ends both (T5: data/preprocessors.py, noise_span_to_unique_sentinel).

    Raises:
        ValueError: the mask has more spans than there are sentinels.
    """
    inputs = _spans_to_sentinels(tokens, noise_mask, first_sentinel_id, num_sentinels)
    targets = _spans_to_sentinels(tokens, ~noise_mask, first_sentinel_id, num_sentinels)
    eos = np.asarray([eos_id], np.int32)
    return np.concatenate([inputs, eos]), np.concatenate([targets, eos])


def _spans_to_sentinels(
    tokens: Int32[np.ndarray, " raw_tokens"],
    mask: Bool[np.ndarray, " raw_tokens"],
    first_sentinel_id: int,
    num_sentinels: int,
) -> Int32[np.ndarray, " shorter"]:
    """Replaces each run of True in `mask` by one sentinel, numbered downwards."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    spans = int(starts.sum())
    if spans > num_sentinels:
        raise ValueError(
            f"a document of {tokens.size} tokens needs {spans} sentinels, but the tokenizer has "
            f"{num_sentinels}: shorten `inputs_length` or take a tokenizer with more."
        )
    replaced = tokens.copy()
    replaced[starts] = first_sentinel_id - np.arange(spans, dtype=np.int32)
    return replaced[starts | ~mask]
