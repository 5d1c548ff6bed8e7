# SPDX-License-Identifier: Apache-2.0
"""Reads stacked experts `[expert, in, out]` group by group, decompressing each chunk once.

A chunk may span many experts (T5X: checkpoints._choose_chunk_shape), so reading expert by expert
would decompress it as many times. The experts that one row of chunks spans are a block. Groups take
whole blocks straight from the store; a block that a group takes only in part is kept until it has
been served, in memory, or in a scratch file where the memory budget is smaller than the block. The
scratch file is written and read, not mapped: a map's pages would count as the process's memory.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from qmoe_jax.checkpoints import kvstore, t5x, t5x_tree
from qmoe_jax.checkpoints.errors import CheckpointError

_IN_FLIGHT = 1 << 30  # bytes of chunks being read at one time, where the budget allows


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """Consecutive experts of several matrices; the arrays are the receiver's own."""

    start: int
    stop: int
    arrays: dict[str, Shaped[np.ndarray, "group _ _"]]  # in the stored dtype


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The experts of one parameter, and how they are cut into chunks."""

    leaf: t5x_tree.Leaf
    array: ts.TensorStore | None  # None: the leaf is inline
    chunks: tuple[int, ...]

    @property
    def block_bytes(self) -> int:
        """Size of a block that may have to be kept: none if each expert has its own chunks."""
        if self.chunks[0] == 1:
            return 0
        return self.chunks[0] * self.expert_bytes

    @property
    def expert_bytes(self) -> int:
        return math.prod(self.leaf.shape[1:]) * self.leaf.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Room for one block: expert after expert, each chunk's part of an expert after the last."""

    file: BinaryIO
    folder: pathlib.Path


@dataclasses.dataclass
class _Kept:
    """The block that groups have taken in part, if any: experts [first, last)."""

    first: int = 0
    last: int = 0
    values: np.ndarray | None = None
    scratch: _Scratch | None = None  # holds the values instead


@dataclasses.dataclass(frozen=True)
class ChunkRoom:
    """What `expert_groups` takes beside the groups it hands out, where chunks span experts."""

    memory: int = 0  # bytes: blocks kept, and chunks being read
    scratch: int = 0  # bytes of disk
    experts: int = 1  # of the largest block


def chunk_room(
    checkpoint: t5x.T5xCheckpoint, names: Sequence[str], memory_budget: int
) -> ChunkRoom:
    """Of one layer; reads metadata only.

    Raises:
      CheckpointError: see `expert_groups`.
    """
    stacks = _open_stacks(checkpoint, names)
    spilled = sum(stacks[name].block_bytes for name in _spilled(stacks, memory_budget))
    blocks = sum(stack.block_bytes for stack in stacks.values())
    return ChunkRoom(
        memory=blocks - spilled + min(blocks, memory_budget, _IN_FLIGHT),
        scratch=spilled,
        experts=max(stack.chunks[0] for stack in stacks.values()),
    )


def expert_groups(
    checkpoint: t5x.T5xCheckpoint,
    names: Sequence[str],
    group_size: int,
    *,
    memory_budget: int,
    scratch_dir: pathlib.Path | None,
    start: int = 0,
) -> Generator[ExpertGroup, None, None]:
    """Yields consecutive groups of experts; decompresses no chunk twice.

    Args:
      checkpoint: an opened checkpoint.
      names: parameters of shape `[experts, in, out]`, all of the same number of experts.
      group_size: experts a group; the last group may be smaller.
      memory_budget: bytes that kept blocks may take, beside the group that is handed out. Each name
        keeps at most one block: the experts that one of its chunks spans. Chunks being read take
        as much again at most, and no more than 1 GiB or one chunk.
      scratch_dir: where blocks go that the budget has no room for (see `chunk_room`); freed when
        the iterator is exhausted or closed, also by the end of the process.
      start: the first expert; blocks wholly before it are not read.

    Raises:
      CheckpointError: a name is unknown or no stack of experts; scratch is needed and not given, or
        its disk is full; while iterating also a file missing or damaged.
      ValueError: an argument is out of its range.
    """
    stacks = _open_stacks(checkpoint, names)
    experts = next(iter(stacks.values())).leaf.shape[0]
    if group_size < 1 or memory_budget < 0 or not 0 <= start <= experts:
        raise ValueError(
            f"expected group_size >= 1, memory_budget >= 0 and 0 <= start <= {experts}, got "
            f"{group_size}, {memory_budget} and {start}"
        )
    spilled = _spilled(stacks, memory_budget)
    if spilled and scratch_dir is None:
        needed = sum(stacks[name].block_bytes for name in spilled)
        raise CheckpointError(
            f"the chunks of {', '.join(spilled)} in {checkpoint.path} span more experts than "
            f"memory_budget={memory_budget} bytes hold: pass a scratch_dir with {needed} bytes "
            "free, or a larger memory_budget."
        )
    bounds = [(s, min(s + group_size, experts)) for s in range(start, experts, group_size)]
    scratch_dirs = {} if scratch_dir is None else dict.fromkeys(spilled, scratch_dir)
    return _walk(checkpoint, stacks, bounds, memory_budget, scratch_dirs)


def _open_stacks(checkpoint: t5x.T5xCheckpoint, names: Sequence[str]) -> dict[str, _Stack]:
    leaves = {name: t5x.find_leaf(checkpoint, name) for name in names}
    wrong = {name: leaf.shape for name, leaf in leaves.items() if len(leaf.shape) != 3}
    if wrong or len({leaf.shape[0] for leaf in leaves.values()}) != 1:
        raise CheckpointError(
            "expected names of parameters [experts, in, out] with one number of experts, got "
            f"{ {name: leaf.shape for name, leaf in leaves.items()} } in {checkpoint.path}"
        )
    arrays = t5x.open_arrays(checkpoint, names)
    return {name: _stack(leaf, arrays.get(name)) for name, leaf in leaves.items()}


def _stack(leaf: t5x_tree.Leaf, array: ts.TensorStore | None) -> _Stack:
    chunks = (1, *leaf.shape[1:]) if array is None else t5x.clipped_chunks(array)
    return _Stack(leaf, array, tuple(max(1, size) for size in chunks))


def _spilled(stacks: dict[str, _Stack], memory_budget: int) -> list[str]:
    """Names whose blocks do not fit the budget, when smaller blocks go first."""
    spilled, used = [], 0
    for name in sorted(stacks, key=lambda name: stacks[name].block_bytes):
        if used + stacks[name].block_bytes > memory_budget:
            spilled.append(name)
        else:
            used += stacks[name].block_bytes
    return spilled


def _walk(
    checkpoint: t5x.T5xCheckpoint,
    stacks: dict[str, _Stack],
    bounds: list[tuple[int, int]],
    memory_budget: int,
    scratch_dirs: dict[str, pathlib.Path],
) -> Generator[ExpertGroup, None, None]:
    in_flight = min(memory_budget, _IN_FLIGHT)
    with contextlib.ExitStack() as files:
        kept = {name: _Kept() for name in stacks}
        for name, folder in scratch_dirs.items():
            kept[name].scratch = files.enter_context(_scratch(stacks[name], folder))
        for start, stop in bounds:
            # Not bound here: the caller alone holds a group, and can free it before the next.
            yield _read_group(checkpoint, stacks, kept, start, stop, in_flight)


def _read_group(
    checkpoint: t5x.T5xCheckpoint,
    stacks: dict[str, _Stack],
    kept: dict[str, _Kept],
    start: int,
    stop: int,
    in_flight: int,
) -> ExpertGroup:
    arrays = {}
    for name, stack in stacks.items():
        with kvstore.explained(checkpoint.path, name):
            arrays[name] = _take(stack, kept[name], start, stop, in_flight)
    return ExpertGroup(start, stop, arrays)


@contextlib.contextmanager
def _scratch(stack: _Stack, folder: pathlib.Path) -> Iterator[_Scratch]:
    """Room in a nameless file: it vanishes with the process, however that ends."""
    with contextlib.ExitStack() as files:
        with _explained(stack, folder):
            file = files.enter_context(tempfile.TemporaryFile(dir=folder))
            # A full disk shows now, not when a part of the block has been read.
            os.posix_fallocate(file.fileno(), 0, stack.block_bytes)
        yield _Scratch(file, folder)


@contextlib.contextmanager
def _explained(stack: _Stack, folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"scratch_dir={folder} cannot take {stack.block_bytes} bytes: {error}. Free some "
            "there, pass another scratch_dir, or a larger memory_budget."
        ) from error


def _take(stack: _Stack, kept: _Kept, start: int, stop: int, in_flight: int) -> np.ndarray:
    """Experts [start, stop), the next ones: from the block kept, whole blocks, then a new block."""
    depth, (experts, *matrix) = stack.chunks[0], stack.leaf.shape
    out, at = np.empty((stop - start, *matrix), stack.leaf.dtype), start
    while at < stop:
        if at < kept.last:
            end = min(stop, kept.last)
            _serve(stack, kept, at, out[at - start : end - start])
        elif at % depth == 0 and (end := stop - stop % depth) > at:
            _copy(stack, at, end, out[at - start : end - start], in_flight)
        else:
            end, kept.first = at, at - at % depth
            kept.last = min(kept.first + depth, experts)
            _keep(stack, kept, in_flight)
        at = end
    return out


def _keep(stack: _Stack, kept: _Kept, in_flight: int) -> None:
    """Reads the block of experts [first, last)."""
    if kept.scratch is not None:
        _spill(stack, kept.scratch, kept.first, kept.last, in_flight)
        return
    kept.values = np.empty((kept.last - kept.first, *stack.leaf.shape[1:]), stack.leaf.dtype)
    _copy(stack, kept.first, kept.last, kept.values, in_flight)


def _serve(stack: _Stack, kept: _Kept, at: int, into: np.ndarray) -> None:
    """Fills `into` with experts of the block kept, and frees its memory after the last one."""
    place = at - kept.first
    if kept.scratch is not None:
        _load(stack, kept.scratch, place, into)
        return
    assert kept.values is not None
    into[...] = kept.values[place : place + len(into)]
    if at + len(into) == kept.last:
        kept.values = None


def _copy(stack: _Stack, start: int, stop: int, into: np.ndarray, in_flight: int) -> None:
    """Reads experts [start, stop), whole blocks, each chunk once."""
    if stack.array is None:
        assert stack.leaf.inline is not None
        into[...] = stack.leaf.inline[start:stop]
        return

    def room(box: tuple[slice, ...]) -> np.ndarray:
        return into[(slice(box[0].start - start, box[0].stop - start), *box[1:])]

    for _ in _chunks(stack, start, stop, room, in_flight):
        pass


def _spill(stack: _Stack, scratch: _Scratch, start: int, stop: int, in_flight: int) -> None:
    """Reads the block of experts [start, stop) into the scratch file."""

    def room(box: tuple[slice, ...]) -> np.ndarray:
        return np.empty([side.stop - side.start for side in box], stack.leaf.dtype)

    offset = 0
    for chunk in _chunks(stack, start, stop, room, in_flight):
        with _explained(stack, scratch.folder):
            for place, part in enumerate(chunk):
                scratch.file.seek(place * stack.expert_bytes + offset)
                scratch.file.write(part.reshape(-1).view(np.uint8).data)
        offset += chunk[0].nbytes


def _load(stack: _Stack, scratch: _Scratch, place: int, into: np.ndarray) -> None:
    """The inverse of `_spill`, from the expert at `place` of the block on."""
    for number, matrix in enumerate(into):
        with _explained(stack, scratch.folder):
            scratch.file.seek((place + number) * stack.expert_bytes)
            expert = np.frombuffer(scratch.file.read(stack.expert_bytes), stack.leaf.dtype)
        offset = 0
        for _, *box in _boxes(0, 1, stack):
            part = matrix[tuple(box)]
            part[...] = expert[offset : offset + part.size].reshape(part.shape)
            offset += part.size


def _chunks(
    stack: _Stack,
    start: int,
    stop: int,
    room: Callable[[tuple[slice, ...]], np.ndarray],
    in_flight: int,
) -> Iterator[np.ndarray]:
    """Reads the chunks of experts [start, stop) to where `room` says, several at a time."""
    assert stack.array is not None
    itemsize = stack.array.dtype.numpy_dtype.itemsize
    at_once = max(1, in_flight // max(1, math.prod(stack.chunks) * itemsize))
    pending = collections.deque()

    def finish() -> np.ndarray:
        chunk, box, reading = pending.popleft()
        kvstore.finished(reading, functools.partial(_begin, stack, chunk, box))
        return chunk

    for box in _boxes(start, stop, stack):
        if len(pending) == at_once:
            yield finish()
        chunk = room(box)
        pending.append((chunk, box, _begin(stack, chunk, box)))
    while pending:
        yield finish()


def _begin(stack: _Stack, chunk: np.ndarray, box: tuple[slice, ...]):
    assert stack.array is not None
    return ts.array(chunk.view(stack.array.dtype.numpy_dtype)).write(stack.array[box])


def _boxes(start: int, stop: int, stack: _Stack) -> Iterator[tuple[slice, ...]]:
    """The chunks of experts [start, stop), rows of a matrix last-axis first."""
    ends = (stop, *stack.leaf.shape[1:])
    starts = (start, 0, 0)
    axes = [
        [slice(at, min(at + chunk, end)) for at in range(begin, end, chunk)]
        for begin, end, chunk in zip(starts, ends, stack.chunks, strict=True)
    ]
    return itertools.product(*axes)
