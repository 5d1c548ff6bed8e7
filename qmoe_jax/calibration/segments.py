# SPDX-License-Identifier: Apache-2.0
"""Documents to token segments that fit the model: whole documents, or joined and split."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from qmoe_jax.calibration.tokenizer import Tokenizer

TOKENIZE_BATCH = 512  # documents handed to SentencePiece's threads at once
CONCATENATE = 128  # documents joined before they are split (T5: reduce_concat_tokens)


def token_segments(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    raw_length: int,
    document_mode: str,
    tally: Counter[str],
) -> Iterator[np.ndarray]:
    """Yields int32 segments of 2 to `raw_length` tokens, without EOS, as they are asked for.

    Mode "skip" yields the documents that fit whole, as the published QMoE code does. Mode "split"
    joins 128 documents at a time and cuts them into pieces of `raw_length` and a shorter last one,
    as T5 pre-trains (T5: data/preprocessors.py, span_corruption; of a document beyond 65,536 tokens
    T5 takes a random part, this takes all).

    Args:
        documents: texts, consumed as a stream.
        tokenizer: encodes them, in batches, on all cores.
        raw_length: tokens of the longest segment.
        document_mode: "skip" or "split".
        tally: counts "documents_read", "too_long" and "too_short" so far: documents in mode "skip",
            last pieces in mode "split".

    Raises:
        ValueError: another `document_mode`.
    """
    modes = {"skip": _whole_documents, "split": _split_documents}
    if document_mode not in modes:
        raise ValueError(f"`document_mode` must be 'skip' or 'split', not {document_mode!r}.")
    return modes[document_mode](_tokenized(documents, tokenizer), raw_length, tally)


def _tokenized(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    stream = iter(documents)
    while batch := list(itertools.islice(stream, TOKENIZE_BATCH)):
        yield from tokenizer.encode_batch(batch)


def _whole_documents(
    token_lists: Iterator[np.ndarray], raw_length: int, tally: Counter[str]
) -> Iterator[np.ndarray]:
    for tokens in token_lists:
        tally["documents_read"] += 1
        if tokens.size < 2:
            tally["too_short"] += 1
        elif tokens.size > raw_length:
            tally["too_long"] += 1
        else:
            yield tokens


def _split_documents(
    token_lists: Iterator[np.ndarray], raw_length: int, tally: Counter[str]
) -> Iterator[np.ndarray]:
    while group := list(itertools.islice(token_lists, CONCATENATE)):
        tally["documents_read"] += len(group)
        joined = np.concatenate(group)
        for start in range(0, joined.size, raw_length):
            piece = joined[start : start + raw_length]
            if piece.size < 2:
                tally["too_short"] += 1
            else:
                yield piece
