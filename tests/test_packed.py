# SPDX-License-Identifier: Apache-2.0
"""The records' layout: pytrees, index arithmetic, joining, slicing, checking."""

import dataclasses

import codec_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dictionary_words, validation
from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts
from qmoe_jax.codec import dictionary, packing


def _random(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, PackedExperts]:
    trits = oracle.random_trits(seed, shape, 0.8)
    signs = np.array([-1, 1], np.float32)
    values = np.random.default_rng(seed).integers(1, 100, (*shape[:2], 2)) * signs
    return trits, packing.pack_ternary(trits, values.astype(np.float32))


def _check(packed: PackedExperts, trits: np.ndarray) -> None:
    validation.validate(packed, dictionary.nonzero_table())
    assert packed.shape == trits.shape
    np.testing.assert_array_equal(packing.unpack_ternary(packed), trits)


def test_records_are_pytrees():
    trits, packed = _random(0, (2, 3, 20))
    assert [leaf.dtype.name for leaf in jax.tree.leaves(packed)] == [
        "uint16",
        "uint32",
        "uint32",
        "bfloat16",
    ]
    sizes = jax.tree.map(lambda leaf: leaf.shape, packed)  # leaves that are no arrays
    assert sizes.row_starts == (2, 4)
    abstract = jax.eval_shape(lambda record: record, packed)
    assert isinstance(abstract.codes, jax.ShapeDtypeStruct)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(packed)]
    assert paths == [".codes", ".expert_bases", ".row_starts", ".row_values"]
    through_jit = jax.jit(lambda record: record)(packed)
    assert (through_jit.shape, through_jit.codec) == (packed.shape, packed.codec)
    _check(through_jit, trits)


def test_static_fields_are_structure():
    _, packed = _random(0, (2, 3, 20))
    other = dataclasses.replace(packed, shape=(2, 3, 19))
    assert jax.tree.structure(packed) != jax.tree.structure(other)
    assert jax.tree.structure(packed) == jax.tree.structure(_random(1, (2, 3, 20))[1])


def test_records_are_placed_by_shardings():
    trits, packed = _random(0, (2, 3, 20))
    mesh = Mesh(np.array(jax.devices()[:1]), ("experts",))
    sharding = NamedSharding(mesh, PartitionSpec("experts"))
    shardings = jax.tree.map(lambda _: sharding, packed)
    placed = jax.device_put(packed_lib.to_host(packed), shardings)
    assert placed.codes.sharding == sharding
    _check(placed, trits)


def test_a_shard_knows_its_number_of_experts():
    trits, packed = _random(0, (4, 3, 20))
    joined = packed_lib.join([packed], slabs=2)
    # What `shard_map` hands to the second of two devices.
    shard = jax.tree.map(lambda leaf: jnp.asarray(leaf[leaf.shape[0] // 2 :]), joined)
    assert shard.shape[0] == 4
    _check(packed_lib.local_view(shard), trits[2:])


def test_layout_counts_beyond_32_bits():
    counts = np.array([2**32 - 1, 1, 2**32 - 65, 64], np.uint32)
    bases, words = packed_lib.expert_layout(counts)
    assert bases.tolist() == [0, 2**26, 2**26 + 1, 2**27]
    assert words == 2**33 + 64
    bases, words = packed_lib.expert_layout(counts, slabs=2)
    assert bases.tolist() == [0, 2**26, 0, 2**26 - 1]
    assert words == 2**32 + 64
    with pytest.raises(ValueError, match="use more slabs"):
        packed_lib.expert_layout(np.full(66, 2**32 - 1, np.uint32))


@pytest.mark.parametrize("slabs", [1, 2, 3, 6])
def test_join_puts_groups_one_after_another(slabs):
    groups = [_random(seed, (experts, 7, 33)) for seed, experts in enumerate([1, 3, 2])]
    joined = packed_lib.join((packed for _, packed in groups), slabs)
    assert joined.codes.shape[0] == slabs
    assert (np.asarray(joined.expert_bases).reshape(slabs, -1)[:, 0] == 0).all()
    values = np.concatenate([np.asarray(packed.row_values) for _, packed in groups])
    np.testing.assert_array_equal(joined.row_values, values)
    _check(joined, np.concatenate([trits for trits, _ in groups]))


def test_join_pads_slabs_to_a_common_size():
    trits, packed = _random(0, (2, 7, 33))
    joined = packed_lib.join([packed], slab_words=1000)
    assert joined.codes.shape == (1, 1024)
    _check(joined, trits)


def test_join_refuses_what_does_not_fit():
    (_, first), (_, second) = _random(0, (2, 3, 20)), _random(0, (2, 3, 21))
    with pytest.raises(ValueError, match="must agree"):
        packed_lib.join([first, second])
    with pytest.raises(ValueError, match="must agree"):
        packed_lib.join([])
    with pytest.raises(ValueError, match="4 experts do not divide into 3"):
        packed_lib.join([first, first], slabs=3)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 3), (3, 1), (0, 4)])
def test_slices_cross_slabs(first, count):
    trits, packed = _random(5, (4, 6, 50))
    part = packed_lib.expert_slice(packed_lib.join([packed], slabs=2), first, count)
    np.testing.assert_array_equal(part.row_values, packed.row_values[first : first + count])
    _check(part, trits[first : first + count])


@pytest.mark.parametrize(("first", "count"), [(0, 5), (-1, 2), (2, 0)])
def test_slices_stay_inside(first, count):
    with pytest.raises(ValueError, match="not a part of 4 experts"):
        packed_lib.expert_slice(_random(5, (4, 2, 8))[1], first, count)


def test_entries_have_room_for_three_nonzeros_and_31_weights():
    trits = np.zeros((1, 28), np.uint8)
    trits[0, :4] = 1
    with pytest.raises(ValueError, match="4 non-zeros"):
        dictionary_words.word_entries(trits, np.array([4], np.uint8))
    with pytest.raises(ValueError, match="32 weights"):
        dictionary_words.word_entries(trits[:, ::-1] * np.uint8(0), np.array([32], np.uint8))


def _damage(packed: PackedExperts, **changes) -> PackedExperts:
    """A host copy with single numbers replaced: field=(index, value)."""
    fields = {}
    for name, (index, value) in changes.items():
        fields[name] = np.array(getattr(packed, name))
        fields[name][index] = value
    return dataclasses.replace(packed_lib.to_host(packed), **fields)


def _last_word(packed: PackedExperts, expert: int, row: int) -> tuple[int, int]:
    word = 64 * int(packed.expert_bases[expert]) + int(packed.row_starts[expert, row + 1]) - 1
    return 0, word


def _longer_word(word: int) -> int:
    lengths = dictionary.build().lengths
    return int(np.flatnonzero(lengths != lengths[word])[0])


def _nonzero_end(word: int) -> int:
    """A word as long as this one whose last trit is not zero."""
    digits = oracle.words()[word]
    return oracle.words().index(bytes([0] * (len(digits) - 1) + [3]))


@pytest.fixture(scope="module")
def record():
    return _random(2, (3, 5, 61))[1]


def test_validate_names_what_is_damaged(record):
    at = _last_word(record, 1, 3)
    word = int(record.codes[at])
    damaged = {
        "expert 1, row 3: words expand to": {"codes": (at, _longer_word(word))},
        "expert 1, row 3: the weight that pads": {"codes": (at, _nonzero_end(word))},
        "`row_starts` of expert 2, row 0: must begin at 0": {"row_starts": ((2, 0), 1)},
        "expert 0, row 1: must begin|row 2: must begin .* got 2147483648": {
            "row_starts": ((0, 2), 2**31)
        },
        "expert 0, row 3: `row_starts` must begin": {
            "row_starts": ((0, 4), record.row_starts[0, 3])
        },
        "expert 0 ends at word 4294967295": {"row_starts": ((0, -1), 2**32 - 1)},
        "expert 2 ends at word": {"expert_bases": (2, 2**32 - 1)},
        "expert 0 ends at word": {"expert_bases": (1, 0)},
        "`row_values` of expert 2, row 4 are not": {"row_values": ((2, 4, 1), np.nan)},
    }
    for message, changes in damaged.items():
        with pytest.raises(ValueError, match=message):
            validation.validate(_damage(record, **changes), dictionary.nonzero_table())
    validation.validate(_damage(record), dictionary.nonzero_table())


def test_validate_compares_sizes(record):
    host, entries = packed_lib.to_host(record), dictionary.nonzero_table()
    for changes, message in [
        ({"shape": (3, 6, 61)}, "`row_starts` of .* must be"),
        ({"shape": (4, 5, 61)}, "`expert_bases` of .* must be"),
        ({"shape": (3, 5, 0)}, "must be positive"),
        ({"codes": host.codes[:, :-1]}, "multiple of 64 words"),
        ({"codes": host.codes.reshape(2, -1)}, "slabs that divide 3 experts"),
        ({"row_values": host.row_values[:, 1:], "row_starts": host.row_starts}, "`row_values`"),
    ]:
        with pytest.raises(ValueError, match=message):
            validation.validate(dataclasses.replace(host, **changes), entries)


def test_validate_compares_kinds_of_numbers(record):
    """A reader builds records without the tests' run-time checks, which `tree.map` skips too."""
    host, entries = packed_lib.to_host(record), dictionary.nonzero_table()
    signed = jax.tree.map(lambda a: a.astype(np.int32) if a.dtype == np.uint32 else a, host)
    with pytest.raises(ValueError, match=r"`expert_bases` of .* must be \('uint32', \(3,\)\)"):
        validation.validate(signed, entries)
    flat = jax.tree.map(lambda a: a.reshape(-1) if a.dtype == np.uint16 else a, host)
    with pytest.raises(ValueError, match="`codes` must be slabs"):
        validation.validate(flat, entries)
