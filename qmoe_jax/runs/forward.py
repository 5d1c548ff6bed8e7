# SPDX-License-Identifier: Apache-2.0
"""Samples through all blocks of a checkpoint as it is: one pass over it, however many they are."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.calibration import experts, pipeline, walk
from qmoe_jax.calibration.experts import Assignment
from qmoe_jax.calibration.walk import Activations, Params, Routes, SampleLosses
from qmoe_jax.checkpoints import packed, source
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.inference import packed_walk
from qmoe_jax.models import config as configs
from qmoe_jax.models.block import Block, make_block
from qmoe_jax.models.config import STACKS, Stack
from qmoe_jax.runs import devices, progress, tracks, work
from qmoe_jax.runs.compress import Compute
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.tracks import Track, Version

PACKED: Version = "packed"  # the version whose experts are computed from their packed weights


@dataclasses.dataclass(frozen=True)
class Walk:
    """What all steps of one pass over a checkpoint share."""

    checkpoint: Source
    store: PackedCheckpoint | None  # the same, where a track is of the version PACKED
    tracks: tuple[Track, ...]
    dtype: np.dtype  # of the activations
    compute: Compute
    title: str  # what its lines of progress begin with
    shown: Progress


class _Group(NamedTuple):
    """Consecutive experts of one layer, on the host."""

    packed: bool
    start: int
    stop: int
    arrays: dict[str, Any]  # dense matrices, or what `packed_experts` takes


def total_work(checkpoint: Source, followed: tuple[Track, ...]) -> float:
    """Operations of a walk, in the units of `work.py`."""
    return work.whole_run(checkpoint.config, tracks.num_tokens(followed), solved=False)


def walk_blocks(this: Walk) -> dict[str, SampleLosses]:
    """All tracks through all blocks, with the weights as they are stored; losses by track name.

    Raises:
      CheckpointError: the checkpoint is damaged.
      OSError: no room for the activation buffers.
    """
    with tracks.buffer_folder(this.compute.buffer_dir) as buffer_dir:
        return _walk_blocks(this, buffer_dir)


def _walk_blocks(this: Walk, buffer_dir: pathlib.Path | None) -> dict[str, SampleLosses]:
    config = this.checkpoint.config
    outer = tracks.on_device(source.outer_params(this.checkpoint))
    encoded, states = {}, {}
    for stack in STACKS:
        states = {}  # frees the encoder's buffers, but for its outputs
        with progress.timed(this.shown, "dense part"):
            for track in this.tracks:
                states[track.name] = tracks.prepare(
                    track,
                    stack,
                    config.emb_dim,
                    this.dtype,
                    batch_tokens=devices.batch_tokens(this.compute.batch_tokens),
                    buffer_dir=buffer_dir,
                    encoded=encoded.get(track.name),
                )
                walk.embed(outer, states[track.name])
        for layer in range(configs.num_layers(config, stack)):
            states = _walk_block(this, stack, layer, outer, states)
        with progress.timed(this.shown, "dense part"):
            for name, state in states.items():
                encoded[name] = walk.finish(outer, state, this.dtype)
    with progress.timed(this.shown, "losses"):
        return {name: walk.losses(config, outer, state) for name, state in states.items()}


def _walk_block(
    this: Walk, stack: Stack, layer: int, outer: Params, states: Mapping[str, Activations]
) -> dict[str, Activations]:
    begun = time.perf_counter()
    config = this.checkpoint.config
    block = make_block(config, stack, layer, this.dtype)
    params = tracks.on_device(source.layer_params(this.checkpoint, stack, layer))
    routes: dict[str, Routes] = {}
    with progress.timed(this.shown, "dense part"):
        for track in tracks.followed(this.tracks, states):
            state = states[track.name]
            found = tracks.run_block(track, layer, block, outer, params, state)
            if found is not None:
                routes[track.name] = found
    counts = tracks.num_tokens(this.tracks)
    where = f"{this.title}{stack} block {layer + 1} of {configs.num_layers(config, stack)}"
    done, tokens = work.dense_part(config, stack, block.sparse, counts), counts[stack]
    progress.advance(this.shown, done, where, tokens, time.perf_counter() - begun)
    if block.sparse:
        with progress.timed(this.shown, "experts"):
            _run_experts(this, block, layer, params, states, routes, where)
    progress.line(this.shown, f"{where}: {tokens:,} tokens, {time.perf_counter() - begun:.1f} s")
    return {name: walk.advance(state) for name, state in states.items()}


def _run_experts(
    this: Walk,
    block: Block,
    layer: int,
    params: Params,
    states: Mapping[str, Activations],
    routes: Mapping[str, Routes],
    where: str,
) -> None:
    """The experts group by group; the next group is read meanwhile."""
    assigned = {
        name: experts.assign(found, block.config.num_experts) for name, found in routes.items()
    }
    with pipeline.read_ahead(_groups(this, block, layer)) as groups:
        for group in groups:
            begun = time.perf_counter()
            tokens = _run_group(this, block, params, group, states, routes, assigned)
            done = work.forward(block.config, tokens)
            spent = time.perf_counter() - begun
            progress.advance(this.shown, done, f"{where}, expert {group.stop}", tokens, spent)


def _run_group(
    this: Walk,
    block: Block,
    params: Params,
    group: _Group,
    states: Mapping[str, Activations],
    routes: Mapping[str, Routes],
    assigned: Mapping[str, Assignment],
) -> int:
    """The tokens of a group's experts, those of the tracks that take it in this form.

    A function of its own, so that no group is on the device when the next one comes.

    Returns:
      How many there were.
    """
    # The group is ours: leave no second copy on the host.
    arrays = {
        name: jax.tree.map(jnp.asarray, group.arrays.pop(name)) for name in list(group.arrays)
    }
    run = packed_walk.run_packed_experts if group.packed else experts.run_experts
    tokens = 0
    for track in this.tracks:
        if group.packed != (track.version == PACKED):
            continue
        own = assigned[track.name]
        buffer = states[track.name].updated
        run(block, params, arrays, group.start, buffer, routes[track.name], own)
        tokens += int(own.starts[group.stop] - own.starts[group.start])
    return tokens


def _groups(this: Walk, block: Block, layer: int) -> Iterator[_Group]:
    """The experts of a layer in all forms that the tracks take, each file read once."""
    size = devices.experts_per_group(block.config, this.compute.experts_per_group)
    if this.store is None:
        for dense in this.checkpoint.expert_groups(block.stack, layer, size):
            yield _Group(False, dense.start, dense.stop, dense.arrays)
        return
    also_dense = any(track.version != PACKED for track in this.tracks)
    for entry, records in packed.read_groups(this.store, block.stack, layer):
        yield _Group(True, entry.start, entry.stop, packed_walk.prepare(records))
        if also_dense:
            for dense in source.dequantized(entry.start, records, size):
                yield _Group(False, dense.start, dense.stop, dense.arrays)
