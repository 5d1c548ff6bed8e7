# SPDX-License-Identifier: Apache-2.0
"""Groups of experts: right values in any chunking, each chunk read once, scratch only if needed."""

import errno
import os
import pathlib
import re
import types
import weakref

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from classic_t5x import (
    GZIP,
    ZSTD,
    array_spec,
    file_reads,
    write_array,
    write_checkpoint,
    write_msgpack,
)

from qmoe_jax.checkpoints import kvstore, t5x, t5x_experts
from qmoe_jax.checkpoints.errors import CheckpointError

WI, WO = "encoder/layers_1/mlp/expert/wi/kernel", "encoder/layers_1/mlp/expert/wo/kernel"
PLENTY = 1 << 30
LAYOUTS = {
    "all experts in every chunk": ((8, 6, 4), (8, 3, 12), GZIP, np.float32),
    "blocks of two, bfloat16": ((2, 12, 6), (2, 7, 5), ZSTD, ml_dtypes.bfloat16),
    "one expert a chunk": ((1, 12, 8), (1, 8, 12), GZIP, np.float32),
    "last block smaller": ((3, 12, 8), (5, 8, 5), GZIP, np.float32),
    "chunks beyond the array": ((9, 12, 8), (16, 9, 13), GZIP, np.float32),
    "not alike": ((1, 12, 8), (4, 8, 3), ZSTD, np.float32),
}


def stacks(dtype, experts=8):
    draw = np.random.default_rng(0).standard_normal
    return {
        WI: draw((experts, 12, 8)).astype(dtype),
        WO: draw((experts, 8, 12)).astype(dtype),
    }


def open_layout(directory, layout):
    wi, wo, compressor, dtype = LAYOUTS[layout]
    params = stacks(dtype)
    write_checkpoint(directory, params, {WI: wi, WO: wo}, compressor)
    return t5x.open_checkpoint(directory), params


def chunk_files(directory, name, depth, start):
    """Chunk files that hold an expert from `start` on."""
    names = os.listdir(directory / f"target.{name.replace('/', '.')}")
    blocks = [int(n.split(".")[0]) for n in names if n != ".zarray"]
    return sum((block + 1) * depth > start for block in blocks)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("budget", [0, 1500, PLENTY])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_group_size(layout, budget, group_size, start, tmp_path):
    checkpoint, params = open_layout(tmp_path, layout)
    groups = t5x_experts.expert_groups(
        checkpoint,
        [WI, WO],
        group_size,
        memory_budget=budget,
        scratch_dir=tmp_path,
        start=start,
    )
    before = file_reads()
    at = start
    for group in groups:
        assert (group.start, group.stop) == (at, min(at + group_size, 8))
        for name, values in params.items():
            np.testing.assert_array_equal(group.arrays[name], values[at : group.stop], strict=True)
            group.arrays[name][:] = 0  # the receiver's own: no later group may see this
        at = group.stop
    assert at == 8
    depths = zip([WI, WO], LAYOUTS[layout], strict=False)
    wanted = sum(chunk_files(tmp_path, name, chunks[0], start) for name, chunks in depths)
    assert file_reads() - before == wanted


def test_scratch_is_used_only_where_the_budget_is_too_small(tmp_path):
    checkpoint, _ = open_layout(tmp_path, "not alike")  # wi one expert a chunk, wo four
    block = 4 * 8 * 12 * 4
    assert t5x_experts.chunk_room(checkpoint, [WI, WO], block).scratch == 0
    assert t5x_experts.chunk_room(checkpoint, [WI, WO], block - 1).scratch == block
    assert t5x_experts.chunk_room(checkpoint, [WI], 0).scratch == 0
    assert list(t5x_experts.expert_groups(checkpoint, [WI], 3, memory_budget=0, scratch_dir=None))


def test_smaller_blocks_stay_in_memory_first(tmp_path):
    wi, wo = 2 * 12 * 8 * 4, 8 * 8 * 12 * 4
    write_checkpoint(tmp_path, stacks(np.float32), {WI: (2, 12, 8), WO: (8, 8, 12)})
    checkpoint = t5x.open_checkpoint(tmp_path)
    for budget, scratch in [(wi + wo, 0), (wi + wo - 1, wo), (wi, wo), (wi - 1, wi + wo)]:
        assert t5x_experts.chunk_room(checkpoint, [WO, WI], budget).scratch == scratch


def test_blocks_in_memory_are_counted(tmp_path):
    checkpoint, _ = open_layout(tmp_path, "all experts in every chunk")
    block = 8 * 8 * 12 * 4
    rooms = [t5x_experts.chunk_room(checkpoint, [WI, WO], size) for size in (2 * block, block)]
    assert [room.scratch for room in rooms] == [0, block]
    assert [room.memory for room in rooms] == [4 * block, 2 * block]  # kept, and being read
    assert [room.experts for room in rooms] == [8, 8]
    alone, _ = open_layout(tmp_path / "alone", "one expert a chunk")
    assert t5x_experts.chunk_room(alone, [WI, WO], block) == t5x_experts.ChunkRoom()


def test_missing_scratch_says_how_much(tmp_path):
    checkpoint, _ = open_layout(tmp_path, "all experts in every chunk")
    needed = 2 * 8 * 8 * 12 * 4
    with pytest.raises(CheckpointError, match=rf"{WI}.*scratch_dir with {needed} bytes"):
        t5x_experts.expert_groups(checkpoint, [WI, WO], 2, memory_budget=9, scratch_dir=None)


def open_below(directory):
    """Files open in this process, deleted ones too, that lie or lay in a directory."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.realpath(link).startswith(f"{directory}/")]


def test_scratch_leaves_no_file_behind(tmp_path):
    checkpoint, params = open_layout(tmp_path / "checkpoint_1", "all experts in every chunk")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    groups = t5x_experts.expert_groups(checkpoint, [WI], 3, memory_budget=0, scratch_dir=scratch)
    first = next(groups)
    file, *_ = open_below(scratch)
    kept = np.frombuffer(pathlib.Path(file).read_bytes(), np.float32)
    np.testing.assert_array_equal(np.sort(kept), np.sort(params[WI], axis=None))
    groups.close()
    assert not open_below(scratch)
    assert not list(scratch.iterdir())
    np.testing.assert_array_equal(first.arrays[WI], params[WI][:3])


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_a_group_can_be_freed_before_the_next_is_read(budget, tmp_path):
    checkpoint, _ = open_layout(tmp_path, "blocks of two, bfloat16")
    groups = t5x_experts.expert_groups(
        checkpoint, [WI], 3, memory_budget=budget, scratch_dir=tmp_path
    )
    reference = weakref.ref(next(groups).arrays[WI])
    assert reference() is None


class SpiedTarget:
    """Stands in for tensorstore's view of the receiving array; counts unfinished chunk reads."""

    running, most = 0, 0

    def __init__(self, target):
        self.target = target

    def __getitem__(self, box):
        return SpiedTarget(self.target[box])

    def write(self, source):
        SpiedTarget.running += 1
        SpiedTarget.most = max(SpiedTarget.most, SpiedTarget.running)
        self.pending = self.target.write(source)
        return self

    def result(self):
        SpiedTarget.running -= 1
        return self.pending.result()


@pytest.mark.parametrize(("budget", "at_once"), [(0, 1), (3 * 8 * 6 * 4 * 4, 3), (PLENTY, 4)])
def test_the_budget_bounds_the_chunks_in_flight(budget, at_once, tmp_path, monkeypatch):
    checkpoint, _ = open_layout(tmp_path, "all experts in every chunk")  # wi: four chunks
    spied = types.SimpleNamespace(array=lambda into: SpiedTarget(ts.array(into)))
    monkeypatch.setattr(t5x_experts, "ts", spied)
    monkeypatch.setattr(SpiedTarget, "most", 0)
    list(t5x_experts.expert_groups(checkpoint, [WI], 3, memory_budget=budget, scratch_dir=tmp_path))
    assert (SpiedTarget.running, SpiedTarget.most) == (0, at_once)


class FlakyTarget:
    """Stands in for tensorstore's view; its first reads fail as on a network disk."""

    def __init__(self, target, failures):
        self.target, self.failures = target, failures

    def write(self, source):
        return self if self.failures and self.failures.pop() else self.target.write(source)

    def result(self):
        raise ValueError("Error reading local file [os_error_code='5']")


def test_reads_that_the_system_fails_are_tried_again(tmp_path, monkeypatch):
    checkpoint, expected = open_layout(tmp_path, "all experts in every chunk")
    failures = [True, True, False, True]
    flaky = types.SimpleNamespace(array=lambda into: FlakyTarget(ts.array(into), failures))
    monkeypatch.setattr(t5x_experts, "ts", flaky)
    monkeypatch.setattr(kvstore, "RETRY_SECONDS", (0.0, 0.0))
    options = {"memory_budget": PLENTY, "scratch_dir": tmp_path}
    groups = list(t5x_experts.expert_groups(checkpoint, [WI], 3, **options))
    np.testing.assert_array_equal(np.concatenate([g.arrays[WI] for g in groups]), expected[WI])
    assert not failures
    failures += [True] * 9
    with pytest.raises(CheckpointError, match=rf"cannot read `{WI}` .*Input/output error"):
        list(t5x_experts.expert_groups(checkpoint, [WI], 3, **options))


def test_full_scratch_disk(tmp_path, monkeypatch):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    checkpoint, _ = open_layout(tmp_path, "all experts in every chunk")
    groups = t5x_experts.expert_groups(checkpoint, [WI], 2, memory_budget=0, scratch_dir=tmp_path)
    with pytest.raises(CheckpointError, match=f"scratch_dir={tmp_path}.*No space left.*another"):
        next(groups)


def test_scratch_directory_that_is_not_there(tmp_path):
    checkpoint, _ = open_layout(tmp_path, "all experts in every chunk")
    groups = t5x_experts.expert_groups(
        checkpoint, [WI], 2, memory_budget=0, scratch_dir=tmp_path / "none"
    )
    with pytest.raises(CheckpointError, match="scratch_dir="):
        next(groups)


def test_inline_experts(tmp_path):
    params = stacks(np.float32)
    write_msgpack(tmp_path, params)
    checkpoint = t5x.open_checkpoint(tmp_path)
    groups = t5x_experts.expert_groups(
        checkpoint, [WI, WO], 3, memory_budget=0, scratch_dir=None, start=1
    )
    read = [group.arrays[WO] for group in groups]
    np.testing.assert_array_equal(np.concatenate(read), params[WO][1:], strict=True)
    read[0][:] = 0
    np.testing.assert_array_equal(t5x.read(checkpoint, WO), params[WO])


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_version_2_experts_are_bfloat16(budget, tmp_path):
    values = stacks(ml_dtypes.bfloat16)[WI]
    bits = values.view(np.uint16)
    write_msgpack(tmp_path, {WI: array_spec(WI, bits)}, version=2)
    write_array(tmp_path / f"target.{WI.replace('/', '.')}", bits, (4, 6, 8), GZIP)
    groups = t5x_experts.expert_groups(
        t5x.open_checkpoint(tmp_path), [WI], 3, memory_budget=budget, scratch_dir=tmp_path
    )
    read = np.concatenate([group.arrays[WI] for group in groups])
    np.testing.assert_array_equal(read, values, strict=True)


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_a_missing_chunk_is_an_error_when_its_block_comes(budget, tmp_path):
    checkpoint, params = open_layout(tmp_path, "blocks of two, bfloat16")
    (tmp_path / f"target.{WI.replace('/', '.')}" / "2.0.1").unlink()
    groups = t5x_experts.expert_groups(
        checkpoint, [WI, WO], 2, memory_budget=budget, scratch_dir=tmp_path
    )
    for _ in range(2):
        group = next(groups)
    np.testing.assert_array_equal(group.arrays[WI], params[WI][2:4])
    with pytest.raises(CheckpointError, match=re.compile(f"`{WI}`.*2.0.1", re.DOTALL)):
        next(groups)


def test_experts_that_t5x_wrote(data_dir, tmp_path):
    checkpoint = t5x.open_checkpoint(data_dir / "t5x" / "tiny_switch_c" / "legacy")
    names = [f"decoder/layers_0/mlp/expert/{w}/kernel" for w in ("wi", "wo")]
    groups = list(
        t5x_experts.expert_groups(checkpoint, names, 3, memory_budget=0, scratch_dir=tmp_path)
    )
    for name in names:
        read = np.concatenate([group.arrays[name] for group in groups])
        np.testing.assert_array_equal(read, t5x.read(checkpoint, name), strict=True)


def test_arguments_are_checked_at_once(tmp_path):
    params = stacks(np.float32) | {"other": np.zeros((4, 8, 12), np.float32), "flat": np.ones(3)}
    write_msgpack(tmp_path, params)
    checkpoint = t5x.open_checkpoint(tmp_path)

    def groups(names, group_size=1, budget=0, start=0):
        return t5x_experts.expert_groups(
            checkpoint, names, group_size, memory_budget=budget, scratch_dir=None, start=start
        )

    for names in ([], ["flat"], [WI, "other"]):
        with pytest.raises(CheckpointError, match="one number of experts"):
            groups(names)
    with pytest.raises(CheckpointError, match="no parameter"):
        groups(["none"])
    for bad in ({"group_size": 0}, {"budget": -1}, {"start": 9}, {"start": -1}):
        with pytest.raises(ValueError, match="expected group_size"):
            groups([WI], **bad)
    assert not list(groups([WI], start=8))
