# SPDX-License-Identifier: Apache-2.0
"""All experts of a sparse block, group by group: read, solved, run, packed, committed.

The next group is read and the one before is packed while a group is on the device. Groups that an
earlier attempt committed are not solved again: their tokens go through what is stored.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.calibration import experts, pipeline
from qmoe_jax.calibration.experts import Assignment
from qmoe_jax.calibration.walk import Activations, Params, Routes
from qmoe_jax.checkpoints import packed, source
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.checkpoints.t5x_experts import ExpertGroup
from qmoe_jax.models.block import Block
from qmoe_jax.models.config import Stack
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import BESIDE, LayerRecord
from qmoe_jax.runs import devices, groups, progress, resume, tracks, work
from qmoe_jax.runs.groups import Formats, HessianTokens, Kernels, SolvedGroup
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.resume import Earlier
from qmoe_jax.runs.timeline import WAITING
from qmoe_jax.runs.tracks import CALIBRATION, Track, Version


@dataclasses.dataclass(frozen=True)
class Run:
    """What all steps of one compression share."""

    original: Source
    output: pathlib.Path
    earlier: Earlier
    quantizer: Quantizer
    formats: Formats
    tracks: tuple[Track, ...]
    keep: Mapping[Stack, np.ndarray | None]  # positions that the Hessians count
    group_size: int  # experts
    halved: list[int]  # group sizes that took its place, each when the device ran out of memory
    batch_tokens: int
    buffer_dir: pathlib.Path | None
    shown: Progress


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A block whose dense part has run, and where its tokens go."""

    block: Block
    number: int
    params: Mapping[Version, Params]
    states: Mapping[str, Activations]
    routes: Mapping[str, Routes]
    assigned: Mapping[str, Assignment]
    followed: list[Track]  # whose outputs are still needed
    hessian_tokens: HessianTokens | None
    where: str


def compress_experts(
    run: Run,
    block: Block,
    number: int,
    params: Mapping[Version, Params],
    states: Mapping[str, Activations],
    routes: Mapping[str, Routes],
    where: str,
) -> LayerRecord:
    """Compresses the experts of layer `number` and adds their outputs to `states`.

    Raises:
      CheckpointError: a weight is not finite, the checkpoint is damaged, the disk is full.
    """
    begun = time.perf_counter()
    num_experts = block.config.num_experts
    assigned = {name: experts.assign(found, num_experts) for name, found in routes.items()}
    needed = tracks.still_needed(block.config, block.stack, number, states)
    layer = _Layer(
        block=block,
        number=number,
        params=params,
        states=states,
        routes=routes,
        assigned=assigned,
        followed=tracks.followed(run.tracks, needed),
        hessian_tokens=_hessian_tokens(run, block, states, routes, assigned),
        where=where,
    )
    solved = _apply_committed(run, layer)
    first = solved[-1].stop if solved else 0
    with pipeline.write_behind(depth=1) as write:
        packing: list[Future[SolvedGroup]] = []
        with pipeline.read_ahead(_read(run, layer, first)) as ahead:
            while (group := _timed_next(ahead, run.shown, WAITING)) is not None:
                for part in _parts(group, _group_size(run)):
                    packing += _compress_group(run, layer, part, write)
                del part  # or it lives on while the next one is waited for
    solved += [future.result() for future in packing]
    return groups.layer_record(block.stack, number, solved, time.perf_counter() - begun)


def _read(run: Run, layer: _Layer, first: int) -> Iterator[ExpertGroup]:
    """The experts from `first` on; on their way to an accelerator when they are handed out."""
    size = _group_size(run)
    read = run.original.expert_groups(layer.block.stack, layer.number, size, first)
    while (group := _timed_next(read, run.shown, f"read{BESIDE}")) is not None:
        devices.send_ahead(group.arrays)
        yield group
        del group  # the caller alone holds a group, and can free it before the next


def _apply_committed(run: Run, layer: _Layer) -> list[SolvedGroup]:
    """Runs the tokens of groups that an earlier attempt committed; returns their records."""
    stack, store, versions = layer.block.stack, run.earlier.store, _versions(layer.followed)
    entries = store.groups.get((stack, layer.number), ())

    def read() -> Iterator[tuple[ExpertGroup, dict[str, np.ndarray]]]:
        for entry in entries:
            original = ExpertGroup(entry.start, entry.stop, {})
            if versions - {"compressed"}:
                size = entry.stop - entry.start
                original = next(run.original.expert_groups(stack, layer.number, size, entry.start))
            stored = packed.read_group(store, entry) if "compressed" in versions else {}
            size = entry.stop - entry.start
            yield original, {name: source.dense_kernel(stored[name], 0, size) for name in stored}

    with pipeline.read_ahead(read()) as ahead:
        while (found := _timed_next(ahead, run.shown, WAITING)) is not None:
            started = time.perf_counter()
            group, stored = found
            original = groups.on_device(layer.block.stack, layer.number, group)
            compressed = {name: jnp.asarray(array) for name, array in stored.items()}
            _run_group(run, layer, group, original, compressed)
            _advance(run, layer, group, started)
            del found, stored, original, compressed
    return [run.earlier.groups[stack, layer.number, entry.start] for entry in entries]


def _compress_group(run: Run, layer: _Layer, group: ExpertGroup, write) -> list[Future]:
    """A function of its own, so that no group is on the device when the next one comes."""
    started = time.perf_counter()
    found = _solve(run, layer, group)
    if found is None:
        return _compress_halves(run, layer, group, write)
    quantized, original, compressed = found
    packing = write(_pack, run, layer, group, quantized)
    _run_group(run, layer, group, original, compressed)
    _advance(run, layer, group, started)
    return [packing]


def _solve(
    run: Run, layer: _Layer, group: ExpertGroup
) -> tuple[dict[str, Quantized], Kernels, Kernels] | None:
    """What `groups.solve` gives; None where the device has too little memory for the group."""
    try:
        return groups.solve(
            run.quantizer,
            run.formats,
            layer.block,
            layer.number,
            layer.params["compressed"],
            group,
            layer.hessian_tokens,
            run.shown,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or group.stop - group.start == 1:
            raise
        return None


def _compress_halves(run: Run, layer: _Layer, group: ExpertGroup, write) -> list[Future]:
    """Reads a group again, whose arrays are gone, and solves it in two parts: the same bits."""
    run.halved.append(-(-(group.stop - group.start) // 2))
    note = f"the device is out of memory: groups of {_group_size(run)} experts from here on"
    run.shown.console.print(f"{layer.where}, expert {group.start}: {note}", soft_wrap=True)
    again = run.original.expert_groups(
        layer.block.stack, layer.number, _group_size(run), group.start
    )
    packing = []
    for part in again:
        stop = min(part.stop, group.stop)
        inside = {name: array[: stop - part.start] for name, array in part.arrays.items()}
        for smaller in _parts(ExpertGroup(part.start, stop, inside), _group_size(run)):
            packing += _compress_group(run, layer, smaller, write)
        if stop == group.stop:
            break
    return packing


def _pack(
    run: Run, layer: _Layer, group: ExpertGroup, quantized: Mapping[str, Quantized]
) -> SolvedGroup:
    """Commits a group; its record is there first."""
    with progress.timed(run.shown, f"pack{BESIDE}"):
        result = groups.pack(run.quantizer, run.formats, group, quantized, layer.hessian_tokens)
        stack = layer.block.stack
        resume.log_group(run.output, stack, layer.number, result)
        packed.commit_experts(run.output, stack, layer.number, group.start, result.packed)
        return dataclasses.replace(result, packed={})


def _run_group(
    run: Run, layer: _Layer, group: ExpertGroup, original: Kernels, compressed: Kernels
) -> None:
    """Every track's tokens through its version of the group's experts."""
    kernels = {"original": original, "compressed": compressed}
    if "round_to_nearest" in _versions(layer.followed):
        kernels["round_to_nearest"] = groups.nearest_kernels(run.quantizer, run.formats, original)
    with progress.timed(run.shown, "expert forward"):
        for track in layer.followed:
            experts.run_experts(
                layer.block,
                layer.params[track.version],
                kernels[track.version],
                group.start,
                layer.states[track.name].updated,
                layer.routes[track.name],
                layer.assigned[track.name],
            )


def _advance(run: Run, layer: _Layer, group: ExpertGroup, started: float) -> None:
    starts = [assigned.starts for assigned in layer.assigned.values()]
    routed = sum(int(at[group.stop] - at[group.start]) for at in starts)
    solved = layer.hessian_tokens is not None
    done = work.expert_group(layer.block.config, group.stop - group.start, routed, solved)
    where = f"{layer.where}, expert {group.stop}"
    progress.advance(run.shown, done, where, routed, time.perf_counter() - started)


def _hessian_tokens(run: Run, block: Block, states, routes, assigned) -> HessianTokens | None:
    if CALIBRATION not in states:
        return None
    num_experts = block.config.num_experts
    counted = experts.assign(routes[CALIBRATION], num_experts, run.keep[block.stack])
    return HessianTokens(
        buffer=states[CALIBRATION].updated,
        counted=counted,
        cap=experts.token_cap(counted, run.quantizer.token_cap),
        routed=np.diff(assigned[CALIBRATION].starts).tolist(),
    )


def _group_size(run: Run) -> int:
    return run.halved[-1] if run.halved else run.group_size


def _parts(group: ExpertGroup, size: int) -> Iterator[ExpertGroup]:
    """A group that was read at a larger size, in parts of `size`."""
    if group.stop - group.start <= size:
        yield group
        return
    for start in range(group.start, group.stop, size):
        stop = min(start + size, group.stop)
        part = slice(start - group.start, stop - group.start)
        yield ExpertGroup(start, stop, {name: a[part] for name, a in group.arrays.items()})


def _versions(followed: list[Track]) -> set[Version]:
    return {track.version for track in followed}


def _timed_next(items: Iterator, shown: Progress, phase: str):
    with progress.timed(shown, phase):
        return next(items, None)
