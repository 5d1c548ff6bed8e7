# SPDX-License-Identifier: Apache-2.0
"""Packs of the "tunstall" codec against an encoder in plain Python, and back."""

import dataclasses

import codec_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_decode, tunstall_words, validation
from qmoe_jax.codec import packing, tunstall

ENTRIES = packing.entries("tunstall")
SHAPES = [(1, 1, 1), (2, 3, 2), (3, 2, 33), (1, 5, 157), (2, 1, 400), (3, 4, 64)]


def _pack(trits: np.ndarray) -> packed_lib.PackedExperts:
    values = np.broadcast_to(np.array([-0.5, 0.75], np.float32), (*trits.shape[:2], 2))
    return packing.pack_ternary(trits, values, "tunstall")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.floats(0, 1), st.integers(0, 2**32 - 1))
@example((1, 5, 157), 0.0, 0)
@example((1, 5, 157), 1.0, 0)
@example((2, 1, 400), 0.99, 0)
@example((2, 1, 400), 0.9, 1)
def test_round_trip_and_every_unit(shape, p0, seed):
    trits = oracle.random_trits(seed, shape, p0)
    packed = packed_lib.to_host(_pack(trits))
    validation.validate(packed, ENTRIES)
    np.testing.assert_array_equal(packing.unpack_ternary(packed), trits)
    trees = np.asarray(packed.trees)
    for expert, matrix in enumerate(trits):
        zeros = int((matrix == 0).sum())
        assert trees[expert] == tunstall.best_tree(zeros, matrix.size - zeros)
        rows, signs = oracle.encode_by_tree(matrix, tunstall.COSTS[trees[expert]])
        assert np.diff(packed.row_starts[expert]).tolist() == [len(row) for row in rows]
        assert packed_lib.expert_words(packed, expert).tolist() == [w for row in rows for w in row]
        units = packed_lib.expert_codes(packed, expert)[packed.row_starts[expert, -1] :]
        bits = [int(unit) >> bit & 1 for unit in units for bit in range(16)]
        assert bits == signs + [0] * (-len(signs) % 16)


@pytest.mark.parametrize("zeros", [0.85, 0.885, 0.92, 0.95])
def test_payload_is_near_entropy(zeros):
    trits = oracle.random_trits(5, (1, 256, 4096), zeros)
    packed = packed_lib.to_host(_pack(trits))
    share = (trits == 0).mean()
    entropy = -share * np.log2(share) - (1 - share) * np.log2((1 - share) / 2)
    payload = 16 * packed_lib.expert_sizes(packed).sum() / trits.size
    assert payload < entropy * (1.05 if zeros < 0.95 else 1.045)


def test_trits_of_value_zero_are_stored_as_zeros():
    trits = oracle.random_trits(7, (1, 4, 200), 0.4)
    values = jnp.array([[[-1, 1], [0, 1], [-1, -0.0], [0, 0]]], jnp.bfloat16)
    packed = packing.pack_ternary(trits, values, "tunstall")
    before, after = (
        sub1_decode.dequantize(jnp.asarray(t), values)
        for t in (trits, packing.unpack_ternary(packed))
    )
    np.testing.assert_array_equal(before, after)
    assert packed.row_starts[0, 4] == packed.row_starts[0, 3]  # a row of zeros has no words


def test_records_join_slice_and_spread_over_slabs():
    trits = oracle.random_trits(3, (4, 9, 130), 0.8)
    parts = [_pack(trits[:1]), _pack(trits[1:])]
    joined = packed_lib.join(parts, slabs=2)
    validation.validate(joined, ENTRIES)
    np.testing.assert_array_equal(packing.unpack_ternary(joined), trits)
    part = packed_lib.expert_slice(joined, 1, 2)
    np.testing.assert_array_equal(packing.unpack_ternary(part), trits[1:3])
    traced = jax.jit(lambda record, first: packing.unpack_ternary(record, first, 1))
    np.testing.assert_array_equal(traced(part, jnp.int32(1)), trits[2:3])


def test_validate_names_what_is_damaged():
    packed = packed_lib.to_host(_pack(oracle.random_trits(2, (3, 5, 61), 0.8)))
    entries = ENTRIES.reshape(tunstall_words.TREES, -1)

    def damage(**changes):
        fields = {name: np.array(getattr(packed, name)) for name in changes}
        for name, (index, value) in changes.items():
            fields[name][index] = value
        return dataclasses.replace(packed, **fields)

    row_end = 64 * int(packed.expert_bases[1]) + int(packed.row_starts[1, 4]) - 1
    lengths = tunstall_words.entry_length(entries[np.asarray(packed.trees)[1]])
    longest = np.argmax(np.where(tunstall_words.entry_count(entries[0]) > 0, lengths, 0))
    start = int(np.asarray(packed.sign_starts)[2, 3])
    damaged = {
        "expert 1, row 3: a word reaches past its 61": {"codes": ((0, row_end), longest)},
        "`trees` of expert 2 is 4": {"trees": (2, 4)},
        "`sign_starts` of expert 2, row 3": {"sign_starts": ((2, 3), start + 1)},
        "expert 2 ends at word": {"sign_starts": ((2, 5), 2**32 - 1)},
        "row 1: must begin at 0 and rise": {"row_starts": ((0, 2), 0)},
    }
    for message, changes in damaged.items():
        with pytest.raises(ValueError, match=message):
            validation.validate(damage(**changes), ENTRIES)
    validation.validate(damage(), ENTRIES)
    with pytest.raises(ValueError, match=r"`trees` of .* must be"):
        validation.validate(dataclasses.replace(packed, trees=None), ENTRIES)
    with pytest.raises(ValueError, match="neither `trees` nor"):
        validation.validate(dataclasses.replace(packed, codec="qmoe"), packing.entries("qmoe"))
