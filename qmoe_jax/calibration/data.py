# SPDX-License-Identifier: Apache-2.0
"""Calibration samples: documents, tokenized and span-corrupted, in flat arrays."""

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qmoe_jax.calibration import corpora, segments, span_corruption
from qmoe_jax.calibration.tokenizer import PAD_ID, Tokenizer

SHUFFLE_BUFFER = 16_384  # documents; about 40 MB of C4


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One corrupted document, without padding."""

    encoder_input_tokens: Int32[np.ndarray, " encoder_length"]
    decoder_input_tokens: Int32[np.ndarray, " decoder_length"]  # targets shifted right, from 0 on
    decoder_target_tokens: Int32[np.ndarray, " decoder_length"]


@dataclasses.dataclass(frozen=True)
class CorpusCounts:
    """What became of the documents read; in mode "split", a "too short" one may be a segment."""

    documents_read: int = 0
    too_long: int = 0
    too_short: int = 0
    raw_tokens: int = 0  # of the samples, before corruption


@dataclasses.dataclass(frozen=True, eq=False)
class SampleSet:
    """Samples one after the other; sample i is `tokens[offsets[i]:offsets[i + 1]]`."""

    encoder_input_tokens: Int32[np.ndarray, " encoder_tokens"]
    decoder_input_tokens: Int32[np.ndarray, " decoder_tokens"]
    decoder_target_tokens: Int32[np.ndarray, " decoder_tokens"]
    encoder_offsets: Int64[np.ndarray, " boundaries"]
    decoder_offsets: Int64[np.ndarray, " boundaries"]
    counts: CorpusCounts = CorpusCounts()

    def __len__(self) -> int:
        return self.encoder_offsets.size - 1

    def __getitem__(self, index: int) -> Sample:
        """Returns views of sample `index`; negative indices count from the end."""
        index = range(len(self))[index]
        decoder = slice(*self.decoder_offsets[index : index + 2])
        return Sample(
            self.encoder_input_tokens[slice(*self.encoder_offsets[index : index + 2])],
            self.decoder_input_tokens[decoder],
            self.decoder_target_tokens[decoder],
        )

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    @property
    def encoder_lengths(self) -> Int64[np.ndarray, " samples"]:
        """Encoder tokens per sample."""
        return np.diff(self.encoder_offsets)

    @property
    def decoder_lengths(self) -> Int64[np.ndarray, " samples"]:
        """Decoder tokens per sample."""
        return np.diff(self.decoder_offsets)


def make_samples(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    num_samples: int,
    *,
    seed: int,
    inputs_length: int = 512,
    noise_density: float = span_corruption.NOISE_DENSITY,
    mean_span: float = span_corruption.MEAN_SPAN,
    document_mode: str = "skip",
    shuffle: bool = True,
) -> SampleSet:
    """Reads documents until `num_samples` samples are made.

    Args:
        documents: texts, consumed as a stream.
        tokenizer: its sentinels mark the spans; its EOS is appended after corruption.
        num_samples: wanted; never fewer are returned.
        seed: of the order and the noise. Sample i's noise depends on `(seed, i)` alone.
        inputs_length: encoder tokens of the longest sample, EOS included: 512 for documents of up
            to 568 tokens.
        noise_density: share of tokens removed.
        mean_span: mean number of tokens of a removed span.
        document_mode: "skip" makes a sample of each document that fits whole, "split" joins
            documents and cuts them (`segments.token_segments`).
        shuffle: draw documents from a seeded buffer of 16,384, instead of in order.

    Raises:
        ValueError: an argument outside its range, too few sentinels for `inputs_length`, or too
            little text.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, not {num_samples}.")
    lengths = span_corruption.span_lengths(inputs_length, noise_density, mean_span)
    if lengths.spans > tokenizer.num_sentinels:
        raise ValueError(
            f"`inputs_length` {inputs_length} needs {lengths.spans} sentinels, but the tokenizer "
            f"has {tokenizer.num_sentinels}: shorten it or take a tokenizer with more."
        )
    if shuffle:
        documents = corpora.shuffled(documents, np.random.default_rng(seed), SHUFFLE_BUFFER)
    tally: Counter[str] = Counter()
    raw = segments.token_segments(documents, tokenizer, lengths.raw_tokens, document_mode, tally)
    corrupt = functools.partial(make_sample, noise_density=noise_density, mean_span=mean_span)
    samples = []
    for index, tokens in enumerate(itertools.islice(raw, num_samples)):
        samples.append(corrupt(tokens, tokenizer, seed=seed, index=index))
        tally["raw_tokens"] += tokens.size
    counts = CorpusCounts(**tally)
    if len(samples) < num_samples:
        raise ValueError(_too_little_text(len(samples), num_samples, counts, lengths.raw_tokens))
    return stack_samples(samples, counts)


def make_sample(
    raw_tokens: Int32[np.ndarray, " raw_tokens"],
    tokenizer: Tokenizer,
    *,
    seed: int,
    index: int,
    noise_density: float = span_corruption.NOISE_DENSITY,
    mean_span: float = span_corruption.MEAN_SPAN,
) -> Sample:
    """Corrupts one document's tokens with the noise of sample `index`.

    Raises:
        ValueError: fewer than 2 tokens, or more spans than sentinels.
    """
    rng = span_corruption.noise_rng(seed, index)
    noise_mask = span_corruption.random_spans_mask(rng, raw_tokens.size, noise_density, mean_span)
    inputs, targets = span_corruption.corrupt_spans(
        raw_tokens,
        noise_mask,
        first_sentinel_id=tokenizer.first_sentinel_id,
        num_sentinels=tokenizer.num_sentinels,
        eos_id=tokenizer.eos_id,
    )
    shifted = np.concatenate([np.asarray([PAD_ID], np.int32), targets[:-1]])
    return Sample(inputs, shifted, targets)


def stack_samples(samples: Sequence[Sample], counts: CorpusCounts | None = None) -> SampleSet:
    """Returns the samples in flat arrays, in their order.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("a sample set needs at least one sample.")
    encoder = [sample.encoder_input_tokens for sample in samples]
    targets = [sample.decoder_target_tokens for sample in samples]
    return SampleSet(
        encoder_input_tokens=np.concatenate(encoder),
        decoder_input_tokens=np.concatenate([sample.decoder_input_tokens for sample in samples]),
        decoder_target_tokens=np.concatenate(targets),
        encoder_offsets=_offsets(encoder),
        decoder_offsets=_offsets(targets),
        counts=counts or CorpusCounts(),
    )


def calibration_masks(
    samples: SampleSet, lowest_sentinel_id: int
) -> tuple[Bool[np.ndarray, " encoder_tokens"], Bool[np.ndarray, " decoder_tokens"]]:
    """Returns which encoder and decoder positions the Hessians count.

    Left out are the encoder's sentinels and the decoder positions that predict one. The published
    QMoE code leaves out each decoder's last position, too: it feeds the closing sentinel, after
    which nothing is known. Here the last position predicts EOS, an ordinary token, and is kept.
    """
    encoder_keep = samples.encoder_input_tokens < lowest_sentinel_id
    return encoder_keep, samples.decoder_target_tokens < lowest_sentinel_id


def fingerprint(samples: SampleSet) -> str:
    """Returns the SHA-256 of the token arrays and offsets, by which another run knows them."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(samples):
        array = getattr(samples, field.name)
        if isinstance(array, np.ndarray):
            little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{field.name} {array.dtype.name} {array.shape}\n".encode())
            digest.update(little_endian.tobytes())
    return digest.hexdigest()


def _offsets(arrays: Sequence[np.ndarray]) -> Int64[np.ndarray, " boundaries"]:
    return np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64)


def _too_little_text(got: int, wanted: int, counts: CorpusCounts, raw_length: int) -> str:
    remedies = "give more text or ask for fewer samples"
    if counts.too_long:
        remedies += ', or set `document_mode` to "split" to cut long documents'
    return (
        f"the text gave {got} of the {wanted} samples wanted: of {counts.documents_read} documents "
        f"{counts.too_long} had more than {raw_length} tokens and {counts.too_short} fewer than 2; "
        f"{remedies}."
    )


def padded(
    rows: Sequence[Int32[np.ndarray, " _"]], batch_size: int, length: int
) -> Int32[np.ndarray, "batch_size length"]:
    """Rows of token ids, filled with 0 to `length`, and with empty rows to `batch_size`."""
    filled = np.zeros((batch_size, length), np.int32)
    for row, tokens in zip(filled, rows, strict=False):
        row[: tokens.size] = tokens
    return filled
