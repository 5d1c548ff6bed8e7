# SPDX-License-Identifier: Apache-2.0
"""The codec is exact: against the published code's output, an oracle, and itself."""

import hashlib
import inspect
import json
import pathlib

import codec_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_decode, validation
from qmoe_jax.codec import dictionary, packing

QMOE = pathlib.Path(__file__).parent / "data" / "qmoe"
CASES = json.loads((QMOE / "codec.json").read_text())
STORED = sorted({name.split("/")[0] for name in np.load(QMOE / "codec.npz").files} - {"make"})


def _values(experts: int, rows: int) -> np.ndarray:
    return np.broadcast_to(np.array([-0.5, 0.75], np.float32), (experts, rows, 2))


def _shape_and_p0(case: str) -> tuple[tuple[int, int], float]:
    shape, p0 = case.split("_p")
    rows, columns = shape.split("x")
    return (int(rows), int(columns)), float(p0)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def goldens():
    with np.load(QMOE / "codec.npz") as file:
        return dict(file)


def _published(goldens, name: str, values: str = "minmax") -> packing.PublishedMatrix:
    words = goldens[f"{name}/w_comp"].view(np.uint16)
    row_values = goldens[f"{name}/{values}"].astype(jnp.bfloat16)
    return packing.PublishedMatrix(words, goldens[f"{name}/row_off"], row_values)


@pytest.mark.parametrize("case", CASES)
def test_published_words_of_every_case(case):
    shape, p0 = _shape_and_p0(case)
    expected = CASES[case]
    trits = oracle.random_trits(expected["seed"], shape, p0)
    assert _sha256(trits) == expected["w_tern_sha"], "the golden's input is not reproduced"
    packed = packing.pack_ternary(trits[None], _values(1, shape[0]))
    matrix = packing.to_published(packed, 0)
    assert len(matrix.w_comp) == expected["codes"]
    assert _sha256(matrix.row_off) == expected["row_off_sha"]
    assert _sha256(matrix.w_comp) == expected["w_comp_sha"]


@pytest.mark.parametrize("case", STORED)
def test_stored_matrices_both_ways(goldens, case):
    trits, values = goldens[f"{case}/w_tern"], goldens[f"{case}/minmax"]
    published = _published(goldens, case)
    packed = packing.from_published(published, trits.shape[1])
    np.testing.assert_array_equal(packing.unpack_ternary(packed)[0], trits)
    ours = packing.to_published(packing.pack_ternary(trits[None], values.reshape(1, -1, 2)), 0)
    np.testing.assert_array_equal(ours.w_comp, published.w_comp)
    np.testing.assert_array_equal(ours.row_off, published.row_off)
    np.testing.assert_array_equal(ours.ter_minmax, published.ter_minmax)


def test_one_sided_rows_of_the_published_code(goldens):
    """There a row whose min or max is 0 spends a word on every pair or so; the weights agree."""
    trits, weights = goldens["make/w_tern"], goldens["make/w"]
    published = _published(goldens, "make", "ter_minmax")
    theirs = packing.from_published(published, trits.shape[1])
    np.testing.assert_array_equal(packing.unpack_ternary(theirs)[0], trits)
    ours = packing.pack_ternary(trits[None], np.asarray(theirs.row_values))
    for packed in (theirs, ours):
        unpacked = packing.unpack_ternary(packed)
        restored = sub1_decode.dequantize(unpacked, jnp.asarray(packed.row_values))
        np.testing.assert_array_equal(restored[0], weights)
    words = np.diff(np.asarray(ours.row_starts[0]))
    two_sided = (np.asarray(theirs.row_values, np.float32)[0] != 0).all(axis=1)
    assert two_sided.any()
    assert not two_sided.all()
    np.testing.assert_array_equal(words[two_sided], np.diff(published.row_off)[two_sided])
    assert words.max() < 12  # theirs: 48
    assert (np.diff(published.row_off)[~two_sided] == 48).all()


def test_all_words_decode_exactly():
    """A row for each word, filled up to 14 pairs by a word of zeros."""
    strings = oracle.words()
    zeros = [strings.index(bytes(pairs)) for pairs in range(1, 15)]
    rows = [[i, zeros[13 - len(s)]] if len(s) < 14 else [i] for i, s in enumerate(strings)]
    trits = np.stack([oracle.decode_row(row, 28) for row in rows])
    matrix = packing.PublishedMatrix(
        np.array([word for row in rows for word in row], np.uint16),
        np.cumsum([0] + [len(row) for row in rows]).astype(np.int32),
        _values(1, len(rows)).astype(jnp.bfloat16).reshape(-1),
    )
    packed = packing.from_published(matrix, 28)
    np.testing.assert_array_equal(packing.unpack_ternary(packed)[0], trits)
    greedy = packing.to_published(packing.pack_ternary(trits[None], _values(1, len(rows))), 0)
    words, offsets = oracle.encode_matrix(trits)
    np.testing.assert_array_equal(greedy.w_comp, words)
    np.testing.assert_array_equal(greedy.row_off, offsets)


# A shape is a compilation: few of them, chosen, and many matrices of each.
SHAPES = [(1, 1, 1), (2, 3, 2), (3, 2, 3), (1, 5, 57), (2, 1, 100), (3, 4, 28)]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.floats(0, 1), st.integers(0, 2**32 - 1))
@example((1, 1, 1), 0.0, 0)
@example((1, 5, 57), 1.0, 0)
@example((1, 5, 57), 0.0, 0)
def test_round_trip_and_greedy_parse(shape, p0, seed):
    trits = oracle.random_trits(seed, shape, p0)
    packed = packing.pack_ternary(trits, _values(*shape[:2]))
    validation.validate(packed, dictionary.nonzero_table())
    np.testing.assert_array_equal(packing.unpack_ternary(packed), trits)
    for expert, matrix in enumerate(trits):
        words, offsets = oracle.encode_matrix(matrix)
        ours = packing.to_published(packed, expert)
        np.testing.assert_array_equal(ours.w_comp, words)
        np.testing.assert_array_equal(ours.row_off, offsets)


@pytest.mark.parametrize("constant", [0, 1, 2])
def test_constant_matrices(constant):
    trits = np.full((2, 3, 41), constant, np.uint8)
    packed = packing.pack_ternary(trits, _values(2, 3))
    np.testing.assert_array_equal(packing.unpack_ternary(packed), trits)


def test_trits_of_value_zero_are_stored_as_zeros():
    trits = oracle.random_trits(7, (1, 4, 200), 0.4)
    values = jnp.array([[[-1, 1], [0, 1], [-1, -0.0], [0, 0]]], jnp.bfloat16)
    packed = packing.pack_ternary(trits, values)
    expected = trits.copy()
    expected[0, 1][expected[0, 1] == 1] = 0
    expected[0, 2][expected[0, 2] == 2] = 0
    expected[0, 3] = 0
    unpacked = packing.unpack_ternary(packed)
    np.testing.assert_array_equal(unpacked, expected)
    before, after = (sub1_decode.dequantize(jnp.asarray(t), values) for t in (trits, unpacked))
    np.testing.assert_array_equal(before, after)
    assert int(packed.row_starts[0, 4] - packed.row_starts[0, 3]) == -(-200 // 28)


def test_a_range_of_experts_traced_and_not():
    trits = oracle.random_trits(3, (5, 6, 31), 0.8)
    packed = packing.pack_ternary(trits, _values(5, 6))
    np.testing.assert_array_equal(packing.unpack_ternary(packed, 2, 3), trits[2:5])
    traced = jax.jit(lambda record, first: packing.unpack_ternary(record, first, 2))
    for first in range(4):
        unpacked = traced(packed, jnp.int32(first))
        np.testing.assert_array_equal(unpacked, trits[first : first + 2])


def test_sizes_of_a_slab_are_few_and_close():
    sizes = {packing._bucket(64 * blocks) for blocks in range(2**10, 2**11)}
    assert len(sizes) <= 5
    for words in (64, 128, 2048, 64 * 1025, 10**9 // 64 * 64):
        assert words <= packing._bucket(words) <= 1.25 * words
        assert packing._bucket(words) % 64 == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantized_weights_are_row_values(dtype):
    trits = jnp.array([[[0, 1, 2], [2, 0, 1]]], jnp.uint8)
    values = jnp.array([[[-0.25, 3], [-7, 0.5]]], jnp.bfloat16)
    weights = sub1_decode.dequantize(trits, values, dtype)
    assert weights.dtype == dtype
    np.testing.assert_array_equal(weights, jnp.array([[[0, -0.25, 3], [0.5, 0, -7]]], dtype))


def test_row_values_must_be_exact():
    trits, values = np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 2), np.float32)
    values[1, 2, 0] = 0.1
    with pytest.raises(ValueError, match=r"expert 1, row 2: 0\.1.* not a finite bfloat16"):
        packing.pack_ternary(trits, values)
    values[1, 2, 0] = np.inf
    with pytest.raises(ValueError, match="expert 1, row 2: inf"):
        packing.pack_ternary(trits, values)


def test_bad_trits():
    trits = np.zeros((1, 2, 4), np.uint8)
    with pytest.raises(ValueError, match="must be 0, 1 or 2, got 3"):
        packing.pack_ternary(trits + np.uint8(3), _values(1, 2))
    with pytest.raises(ValueError, match="empty or too large"):
        packing.pack_ternary(trits[:, :, :0], _values(1, 2))
    with pytest.raises(ValueError, match=r"`row_values` must be \(1, 2, 2\), got \(1, 1, 2\)"):
        # Unwrapped: the run-time checks of the tests would be first.
        inspect.unwrap(packing.pack_ternary)(trits, _values(1, 1))
    huge = np.broadcast_to(np.uint8(0), (1, 2**15, 2**16))
    with pytest.raises(ValueError, match="pack fewer experts"):
        packing.pack_ternary(huge, _values(1, 2**15))


def test_bad_ranges_and_codecs():
    packed = packing.pack_ternary(np.zeros((2, 1, 4), np.uint8), _values(2, 1))
    for first, count in [(0, 3), (2, 1), (-1, 1), (0, 0)]:
        with pytest.raises(ValueError, match="not a part of 2 experts"):
            packing.unpack_ternary(packed, first, count)
    other = packed_lib.PackedExperts(*jax.tree.leaves(packed), shape=packed.shape, codec="another")
    with pytest.raises(ValueError, match="codec 'another', expected one of"):
        packing.unpack_ternary(other)


def test_damaged_published_matrices(goldens):
    good = _published(goldens, "32x31_p0.5")
    with pytest.raises(ValueError, match="expand to 32 weights, expected 34"):
        packing.from_published(good, 33)
    empty = packing.PublishedMatrix(good.w_comp, good.row_off[:0], good.ter_minmax)
    with pytest.raises(ValueError, match="end at the 187 words"):
        packing.from_published(empty, 31)
    short = packing.PublishedMatrix(good.w_comp[:-1], good.row_off, good.ter_minmax)
    with pytest.raises(ValueError, match="end at the 186 words"):
        packing.from_published(short, 31)
