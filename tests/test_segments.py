# SPDX-License-Identifier: Apache-2.0
"""Documents cut to segments: nothing lost, nothing too long, everything counted."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SENTENCES, sentencepiece_model

from qmoe_jax.calibration import segments, tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "sentencepiece.model"
    path.write_bytes(sentencepiece_model())
    return tokenizer.load_tokenizer(path, extra_ids=32)


def cut(texts, tokenizer, raw_length, mode):
    tally = Counter()
    return list(segments.token_segments(texts, tokenizer, raw_length, mode, tally)), tally


texts = st.lists(st.sampled_from(["", "a", *SENTENCES[:50]]), max_size=300)


@settings(deadline=None, max_examples=30)
@given(texts=texts, raw_length=st.integers(2, 60))
def test_whole_documents_are_kept_or_counted(tiny, texts, raw_length):
    found, tally = cut(texts, tiny, raw_length, "skip")
    encoded = [tiny.encode(text) for text in texts]
    fitting = [tokens for tokens in encoded if 2 <= tokens.size <= raw_length]
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in fitting]
    assert tally["documents_read"] == len(texts)
    assert tally["too_short"] == sum(tokens.size < 2 for tokens in encoded)
    assert tally["too_long"] == sum(tokens.size > raw_length for tokens in encoded)


@settings(deadline=None, max_examples=30)
@given(texts=texts, raw_length=st.integers(2, 60))
def test_split_documents_are_128_joined_and_cut(tiny, texts, raw_length):
    found, tally = cut(texts, tiny, raw_length, "split")
    expected, too_short = [], 0
    for group in (texts[:128], texts[128:256], texts[256:]):
        joined = [int(token) for text in group for token in tiny.encode(text)]
        pieces = [joined[i : i + raw_length] for i in range(0, len(joined), raw_length)]
        expected += [piece for piece in pieces if len(piece) > 1]
        too_short += sum(len(piece) == 1 for piece in pieces)
    assert [tokens.tolist() for tokens in found] == expected
    assert tally == Counter(documents_read=len(texts), too_short=too_short)


def test_documents_are_read_as_they_are_needed(tiny):
    endless = iter(lambda: "a class of functions", None)
    tally = Counter()
    found = segments.token_segments(endless, tiny, 100, "skip", tally)
    first = [next(found) for _ in range(3)]
    assert tally == Counter(documents_read=3)
    assert all(tokens.dtype == np.int32 for tokens in first)


def test_unknown_mode(tiny):
    with pytest.raises(ValueError, match="`document_mode` must be 'skip' or 'split', not 'pack'"):
        cut([], tiny, 100, "pack")
