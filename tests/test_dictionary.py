# SPDX-License-Identifier: Apache-2.0
"""The dictionary is the published one, word for word."""

import hashlib
import json

import codec_oracles as oracle
import numpy as np
import pytest

from pallas_kernels import dictionary_words
from qmoe_jax.codec import dictionary


@pytest.fixture(scope="module")
def published(data_dir):
    return json.loads((data_dir / "qmoe" / "dictionary.json").read_text())


def _sha256(table: np.ndarray) -> str:
    return hashlib.sha256(table.astype(table.dtype.newbyteorder("<")).tobytes()).hexdigest()


def test_tables_are_the_published_ones(published):
    hashes = published["sha256_little_endian_raw_bytes"]
    built = dictionary.build()
    assert built.decode_table.dtype == np.uint32
    assert built.encode_table.dtype == np.int32
    assert built.decode_table.size == published["dec_shape"][0]
    assert list(built.encode_table.shape) == published["trie_shape"]
    assert _sha256(built.decode_table) == hashes["dec"]
    assert _sha256(built.encode_table) == hashes["trie"]


def test_histogram_of_lengths(published):
    pairs, words = np.unique(dictionary.build().lengths, return_counts=True)
    counted = {str(n): int(count) for n, count in zip(pairs, words, strict=True)}
    assert counted == published["length_hist_pairs"]


def test_words_are_the_oracles_in_its_order():
    trits = dictionary.word_trits()
    digits = trits[:, 0::2] + 3 * trits[:, 1::2]
    lengths = dictionary.build().lengths
    ours = [row[:n].tobytes() for row, n in zip(digits, lengths, strict=True)]
    assert ours == oracle.words()


def test_every_prefix_is_a_word_and_every_digit_too():
    built = dictionary.build()
    parent, digit = np.nonzero(built.encode_table >= 0)
    child = built.encode_table[parent, digit]
    assert sorted(child) == list(range(dictionary.WORDS))
    lengths = np.append(built.lengths, 0)  # the root's
    np.testing.assert_array_equal(lengths[child], lengths[parent] + 1)
    assert (built.encode_table[dictionary.ROOT] >= 0).all()


def test_no_word_has_more_than_three_nonzeros():
    counts = np.bincount(np.count_nonzero(dictionary.word_trits(), axis=1))
    assert counts.tolist() == [14, 420, 7_700, 57_402]


def test_nonzero_table_tells_every_word():
    entries, trits = dictionary.nonzero_table(), np.zeros((dictionary.WORDS, 28), np.uint8)
    words = np.arange(dictionary.WORDS)
    for field in range(dictionary_words.MAX_NONZEROS):
        present = dictionary_words.entry_count(entries) > field
        position, sign = dictionary_words.entry_nonzero(entries, field)
        trits[words[present], position[present]] = sign[present] + 1
        assert not position[~present].any()
        assert not sign[~present].any()
    np.testing.assert_array_equal(trits, dictionary.word_trits())
    np.testing.assert_array_equal(
        dictionary_words.entry_length(entries), 2 * dictionary.build().lengths
    )


def test_tables_are_shared_and_read_only():
    assert dictionary.build() is dictionary.build()
    built = dictionary.build()
    for table in (built.decode_table, built.encode_table, built.lengths):
        assert not table.flags.writeable
    assert not dictionary.nonzero_table().flags.writeable
