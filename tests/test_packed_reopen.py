# SPDX-License-Identifier: Apache-2.0
"""A packed store that was left in the midst of it, and what is measured of a whole one."""

import dataclasses

import numpy as np
import pytest
import tiny_stores
from tiny_stores import GROUPS, PLACES, Kind

from pallas_kernels import packed as packed_lib
from pallas_kernels import validation
from qmoe_jax.checkpoints import packed
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.codec import dictionary, packing


@pytest.fixture(scope="module")
def ternary(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store"
    tiny_stores.write(path, Kind("qmoe"))
    return path


def half_written(path, left_out=()):
    """A store in which some commits are missing."""
    packed.create(path, tiny_stores.header(Kind("qmoe")))
    for number, (commit, *arguments) in enumerate(tiny_stores.commits(Kind("qmoe"))):
        if number not in left_out:
            commit(path, *arguments)


def test_what_is_committed_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "store"
    half_written(path, left_out=[0])  # a gap: a later group was faster
    whole = packed.reopen(path)
    journal = (path / packed.JOURNAL).read_bytes()
    (path / packed.JOURNAL).write_bytes(journal + b'{"kind": "exp')
    stray = path / "experts" / "encoder.layers_1.0007-0008.bin"
    stray.write_bytes(b"no line names it")
    (path / "params" / "outer.bin.tmp").write_bytes(b"half")
    found = packed.reopen(path)
    assert found == whole
    assert (path / packed.JOURNAL).read_bytes() == journal
    assert not stray.exists()
    assert not (path / "params" / "outer.bin.tmp").exists()
    assert all((path / name).exists() for name in found.files)


def test_a_reopened_store_is_finished_by_what_was_missing(tmp_path):
    path = tmp_path / "store"
    half_written(path, left_out=[1, 2])
    packed.reopen(path)
    for number, (commit, *arguments) in enumerate(tiny_stores.commits(Kind("qmoe"))):
        if number in (1, 2):
            commit(path, *arguments)
    packed.finish(path)
    tiny_stores.write(tmp_path / "other", Kind("qmoe"))
    one, other = (packed.open_checkpoint(p) for p in (path, tmp_path / "other"))
    assert one.groups == other.groups
    assert one.params == other.params


@pytest.mark.parametrize("damage", ["short", "gone", "line", "header"])
def test_what_is_damaged_is_named(damage, tmp_path):
    path = tmp_path / "store"
    half_written(path, left_out=[0])
    file = next(iter(packed.reopen(path).files))
    lines = (path / packed.JOURNAL).read_text().splitlines(keepends=True)
    if damage == "short":
        (path / file).write_bytes((path / file).read_bytes()[:-1])
    elif damage == "gone":
        (path / file).unlink()
    elif damage == "line":
        lines[1] = lines[1][:-5] + "\n"
    else:
        lines = lines[1:]
    (path / packed.JOURNAL).write_text("".join(lines))
    named = file if damage in ("short", "gone") else "journal|manifest"
    with pytest.raises(CheckpointError, match=named):
        packed.reopen(path)


def test_params_are_compared_by_checksum(ternary):
    checkpoint = packed.open_checkpoint(ternary)
    name = "encoder/encoder_norm/scale"
    same = packed.read_params(checkpoint, [name])
    packed.check_params(checkpoint, same, "CHECKPOINT_PATH here")
    other = {name: np.zeros_like(same[name])}
    with pytest.raises(CheckpointError, match=f"CHECKPOINT_PATH here: `{name}` is not what"):
        packed.check_params(checkpoint, other, "CHECKPOINT_PATH here")


@pytest.mark.parametrize("slabs", [1, 3])
def test_load_experts_joins_the_groups(slabs, ternary):
    checkpoint = packed.open_checkpoint(ternary)
    for place in PLACES:
        groups = [tiny_stores.experts(Kind("qmoe"), place, bounds) for bounds in GROUPS]
        for matrix, record in packed.load_experts(checkpoint, *place, slabs=slabs).items():
            expected = packed_lib.join([group[matrix] for group in groups], slabs)
            assert record.codes.shape == expected.codes.shape
            tiny_stores.assert_same(record, expected)
            validation.validate(record, dictionary.nonzero_table())


def test_load_experts_refuses(ternary, tmp_path):
    checkpoint = packed.open_checkpoint(ternary)
    with pytest.raises(ValueError, match=r"encoder/layers_0 of .* has no experts"):
        packed.load_experts(checkpoint, "encoder", 0)
    with pytest.raises(ValueError, match="3 experts do not divide into 2 equal slabs"):
        packed.load_experts(checkpoint, "encoder", 1, slabs=2)
    dense = tiny_stores.write(tmp_path / "dense", Kind("dense"))
    with pytest.raises(ValueError, match="codec 'dense' holds no ternary experts"):
        packed.load_experts(dense, "encoder", 1)
    with pytest.raises(ValueError, match="codec 'dense' holds no ternary experts"):
        packed.slab_words(dense, "encoder", 1, 1)
    with pytest.raises(ValueError, match=r"encoder/layers_0 of .* has no experts"):
        packed.slab_words(checkpoint, "encoder", 0, 1)


@pytest.mark.parametrize("slabs", [1, 3])
@pytest.mark.parametrize("codec", packing.CODECS)
def test_slabs_are_measured_without_reading_words(codec, slabs, tmp_path):
    checkpoint = tiny_stores.write(tmp_path / "p", Kind(codec))
    for place in PLACES:
        found = packed.slab_words(checkpoint, *place, slabs)
        records = packed.load_experts(checkpoint, *place, slabs)
        assert found == {matrix: record.codes.shape[1] for matrix, record in records.items()}


def test_slabs_are_not_measured_by_what_rows_claim(ternary):
    checkpoint = packed.open_checkpoint(ternary)
    first, *others = checkpoint.groups["encoder", 1]
    codes = first.file.arrays["wo/codes"]
    shorter = {"wo/codes": dataclasses.replace(codes, shape=(codes.shape[0] - 1,))}
    file = dataclasses.replace(first.file, arrays=first.file.arrays | shorter)
    groups = (dataclasses.replace(first, file=file), *others)
    checkpoint = dataclasses.replace(checkpoint, groups={("encoder", 1): groups})
    with pytest.raises(CheckpointError, match=r"0000-0001.bin: .*`wo` is not.*its rows have \d+"):
        packed.slab_words(checkpoint, "encoder", 1, 1)
