# SPDX-License-Identifier: Apache-2.0
"""All experts of a sparse block, group by group: read, solved, run, packed, committed.

Every device takes the next group when it is done with one; it reads ahead and packs behind in
threads of its own. Groups that an earlier attempt committed are not solved again: their tokens go
through what is stored.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.calibration import experts, pipeline
from qmoe_jax.calibration.experts import Assignment
from qmoe_jax.calibration.walk import Activations, Routes
from qmoe_jax.checkpoints import packed, source
from qmoe_jax.checkpoints.packed_manifest import GroupEntry
from qmoe_jax.checkpoints.t5x_experts import ExpertGroup
from qmoe_jax.models.block import Block
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.report import BESIDE, LayerRecord
from qmoe_jax.runs import (
    devices,
    groups,
    processes,
    progress,
    resume,
    run_log,
    tracks,
    travel,
    work,
    workers,
)
from qmoe_jax.runs.compression import Run, VersionParams
from qmoe_jax.runs.groups import HessianTokens, Kernels, SolvedGroup
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.timeline import WAITING
from qmoe_jax.runs.tracks import CALIBRATION, Track, Version
from qmoe_jax.runs.workers import Worker


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A block whose dense part has run, and where its tokens go."""

    block: Block
    number: int
    params: list[VersionParams]  # of each device
    states: Mapping[str, Activations]
    routes: Mapping[str, Routes]
    assigned: Mapping[str, Assignment]
    followed: list[Track]  # whose outputs are still needed
    hessian_tokens: HessianTokens | None
    where: str


@dataclasses.dataclass(frozen=True)
class _Read:
    """A group from the disk; what is stored of it, dequantized, if it is committed already."""

    group: ExpertGroup
    stored: dict[str, np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class _Place:
    """A device at work on a layer, and the queue of what it has to write."""

    run: Run
    layer: _Layer
    worker: Worker
    write: Callable[..., Future]

    @property
    def params(self) -> VersionParams:
        return self.layer.params[self.worker.place]


def compress_experts(
    run: Run,
    block: Block,
    number: int,
    params: list[VersionParams],
    states: Mapping[str, Activations],
    routes: Mapping[str, Routes],
    where: str,
) -> LayerRecord:
    """Compresses the experts of layer `number` and adds their outputs to `states`.

    A token has one expert: devices write to different rows of a buffer.

    Raises:
      CheckpointError: a weight is not finite, the checkpoint is damaged, the disk is full.
    """
    begun = time.perf_counter()
    num_experts = block.config.num_experts
    needed = tracks.still_needed(block.config, block.stack, number, states)
    visits = {}
    if not run.processes.alone:
        for name in states:
            visits[name] = travel.to_experts(run.processes, num_experts, states[name], routes[name])
        at_home, states = states, {n: travel.at_experts(states[n], v) for n, v in visits.items()}
        routes = {name: visit.routes for name, visit in visits.items()}
    assigned = {name: experts.assign(found, num_experts) for name, found in routes.items()}
    layer = _Layer(
        block=block,
        number=number,
        params=params,
        states=states,
        routes=routes,
        assigned=assigned,
        followed=tracks.followed(run.tracks, needed),
        hessian_tokens=_hessian_tokens(run, block, states, routes, assigned, visits),
        where=where,
    )
    with contextlib.closing(_read(run, layer)) as read:
        take = pipeline.shared(read)
        found = workers.on_each(run.devices, lambda worker: _work(run, layer, worker, take))
    solved = [group for part in found for group in part]
    if not run.processes.alone:
        for track in layer.followed:
            travel.home(visits[track.name], at_home[track.name])
        records = [run_log.group_record(block.stack, number, group) for group in solved]
        parts = processes.gather(run.processes, records)
        solved = [run_log.solved_group(record) for part in parts for record in part]
    solved.sort(key=lambda group: group.start)
    return groups.layer_record(block.stack, number, solved, time.perf_counter() - begun)


def _work(
    run: Run, layer: _Layer, worker: Worker, take: Callable[[], Iterator[_Read]]
) -> list[SolvedGroup]:
    """Group after group on one device, as they come; the records of those that were its own."""

    def sent() -> Iterator[_Read]:
        with workers.on_device(worker):
            for read in take():
                devices.send_ahead(read.group.arrays, worker.device)
                yield read
                del read  # the caller alone holds a group, and can free it before the next

    with pipeline.write_behind(depth=1) as write, pipeline.read_ahead(sent()) as ahead:
        at = _Place(run, layer, worker, write)
        solved: list[SolvedGroup] = []
        packing: list[Future[list[SolvedGroup]]] = []
        while not worker.stopped.is_set():
            read = _timed_next(ahead, run.shown, WAITING)
            if read is None:
                break
            if read.stored is not None:
                stored = ExpertGroup(read.group.start, read.group.stop, read.stored)
                sizes = (_parts(of, _group_size(run)) for of in (read.group, stored))
                for part, own in zip(*sizes, strict=True):
                    solved += _apply_committed(at, part, own.arrays)
                del part, own, stored
            else:
                for part in _parts(read.group, _group_size(run)):
                    packing += _compress_group(at, part)
                del part
            del read
    return solved + [group for packed_ones in packing for group in packed_ones.result()]


def _read(run: Run, layer: _Layer) -> Generator[_Read]:
    """What an earlier attempt committed, then the experts that are left."""
    stack, number, versions = layer.block.stack, layer.number, _versions(layer.followed)
    entries = run.earlier.store.groups.get((stack, number), ())
    own = run.processes.own(layer.block.config.num_experts)
    for alike in _alike(entries, own):
        start, stop, _ = alike[0]
        # One reading for all of them: the chunks of a checkpoint may hold many experts.
        originals = run.original.expert_groups(stack, number, stop - start, start)
        for start, stop, entry in alike:
            group, stored = ExpertGroup(start, stop, {}), {}
            with progress.timed(run.shown, f"read{BESIDE}"):
                if versions - {"compressed"}:
                    group = _first(next(originals), stop)
                if "compressed" in versions:
                    stored = packed.read_group(run.earlier.store, entry)
                    at, size = start - entry.start, stop - start
                    stored = {name: source.dense_kernel(stored[name], at, size) for name in stored}
            yield _Read(group, stored)
            del group, stored
        del originals  # and what it keeps of chunks
    for first, last in _gaps(entries, own):
        left = run.original.expert_groups(stack, number, _group_size(run), first)
        while first < last:
            with progress.timed(run.shown, f"read{BESIDE}"):
                group = _first(next(left), last)
            first = group.stop
            yield _Read(group, None)
            del group  # the caller alone holds a group, and can free it before the next


def _alike(
    entries: Iterable[GroupEntry], own: range
) -> Iterator[list[tuple[int, int, GroupEntry]]]:
    """This process's part of what is committed, in parts that one reading gives.

    Of each group start, stop and entry; they follow each other, and all but the last are of one
    size.
    """
    found: list[tuple[int, int, GroupEntry]] = []
    for entry in entries:
        start, stop = max(entry.start, own.start), min(entry.stop, own.stop)
        if start >= stop:
            continue
        if found:
            size, (before, end, _) = found[0][1] - found[0][0], found[-1]
            if end != start or end - before != size or stop - start > size:
                yield found
                found = []
        found.append((start, stop, entry))
    if found:
        yield found


def _gaps(entries: Iterable[GroupEntry], own: range) -> Iterator[tuple[int, int]]:
    """Ranges of this process's experts that no entry holds."""
    at = own.start
    for entry in entries:
        if at < entry.start and at < own.stop:
            yield at, min(entry.start, own.stop)
        at = max(at, entry.stop)
    if at < own.stop:
        yield at, own.stop


def _apply_committed(
    at: _Place, group: ExpertGroup, stored: dict[str, np.ndarray]
) -> list[SolvedGroup]:
    """Runs the tokens of a group that an earlier attempt committed; its record, if it begins here.

    Another number of processes may have committed more experts together.
    """
    started, stack, number = time.perf_counter(), at.layer.block.stack, at.layer.number
    original = groups.on_device(stack, number, group)
    compressed = {name: devices.to_device(array) for name, array in stored.items()}
    _run_group(at, group, original, compressed)
    _advance(at, group, started)
    record = at.run.earlier.groups.get((stack, number, group.start))
    return [] if record is None else [record]


def _compress_group(at: _Place, group: ExpertGroup) -> list[Future[list[SolvedGroup]]]:
    """A function of its own, so that no group is on the device when the next one comes."""
    started = time.perf_counter()
    found = _solve(at, group)
    if found is None:
        return _compress_halves(at, group)
    quantized, original, compressed = found
    packing = at.write(_pack, at, group, quantized)
    _run_group(at, group, original, compressed)
    _advance(at, group, started)
    return [packing]


def _solve(at: _Place, group: ExpertGroup) -> tuple[dict[str, Quantized], Kernels, Kernels] | None:
    """What `groups.solve` gives; None where the device has too little memory for the group."""
    try:
        return groups.solve(
            at.run.quantizer,
            at.run.formats,
            at.layer.block,
            at.layer.number,
            at.params["compressed"],
            group,
            at.layer.hessian_tokens,
            at.run.shown,
        )
    except jax.errors.JaxRuntimeError as error:
        if not _can_be_halved(group, error):
            raise
        return None


def _can_be_halved(group: ExpertGroup, error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) and group.stop - group.start > 1


def _compress_halves(at: _Place, group: ExpertGroup) -> list[Future[list[SolvedGroup]]]:
    """Reads a group again, whose arrays are gone, and solves it in two parts: the same bits."""
    run, layer = at.run, at.layer
    run.halved.append(-(-(group.stop - group.start) // 2))
    note = f"the device is out of memory: groups of {_group_size(run)} experts from here on"
    run.shown.console.print(f"{layer.where}, expert {group.start}: {note}", soft_wrap=True)
    size, stack = _group_size(run), layer.block.stack
    packing = []
    for part in run.original.expert_groups(stack, layer.number, size, group.start):
        for smaller in _parts(_first(part, group.stop), _group_size(run)):
            packing += _compress_group(at, smaller)
        if part.stop >= group.stop:
            break
    return packing


def _pack(at: _Place, group: ExpertGroup, quantized: dict[str, Quantized]) -> list[SolvedGroup]:
    """Packs and commits a group, in two parts where the device has too little room."""
    run, stack, number = at.run, at.layer.block.stack, at.layer.number
    with progress.timed(run.shown, f"pack{BESIDE}"), workers.on_device(at.worker):
        tokens = at.layer.hessian_tokens
        try:
            result = groups.pack(run.quantizer, run.formats, group, quantized, tokens)
        except jax.errors.JaxRuntimeError as error:
            if not _can_be_halved(group, error):
                raise
        else:
            resume.commit_group(run.output, run.processes, stack, number, result)
            return [dataclasses.replace(result, packed={})]
    run.shown.console.print(
        f"{at.layer.where}, expert {group.start}: the device is out of memory: packed in two parts",
        soft_wrap=True,
    )
    waiting = {name: jax.device_get(vars(result)) for name, result in quantized.items()}
    quantized.clear()  # frees the device's
    size, found = -(-(group.stop - group.start) // 2), []
    for part in _parts(ExpertGroup(group.start, group.stop, {}), size):
        own = slice(part.start - group.start, part.stop - group.start)
        found += _pack(at, part, {name: _experts(result, own) for name, result in waiting.items()})
    return found


def _experts(fields: Mapping[str, np.ndarray], part: slice) -> Quantized:
    """Some experts of a `Quantized` whose arrays are on the host."""
    own = {
        name: array[:, part] if name == "grid" else array[part] for name, array in fields.items()
    }
    return Quantized(**{name: jnp.asarray(array) for name, array in own.items()})


def _run_group(at: _Place, group: ExpertGroup, original: Kernels, compressed: Kernels) -> None:
    """Every track's tokens through its version of the group's experts."""
    run, layer = at.run, at.layer
    kernels = {"original": original, "compressed": compressed}
    if "round_to_nearest" in _versions(layer.followed):
        kernels["round_to_nearest"] = groups.nearest_kernels(run.quantizer, run.formats, original)
    with progress.timed(run.shown, "expert forward"):
        for track in layer.followed:
            experts.run_experts(
                layer.block,
                at.params[track.version],
                kernels[track.version],
                group.start,
                layer.states[track.name].updated,
                layer.routes[track.name],
                layer.assigned[track.name],
            )


def _advance(at: _Place, group: ExpertGroup, started: float) -> None:
    run, layer = at.run, at.layer
    starts = [assigned.starts for assigned in layer.assigned.values()]
    routed = sum(int(at[group.stop] - at[group.start]) for at in starts)
    solved = layer.hessian_tokens is not None
    done = work.expert_group(layer.block.config, group.stop - group.start, routed, solved)
    where = f"{layer.where}, expert {group.stop}"
    progress.advance(run.shown, done, where, routed, time.perf_counter() - started)


def _hessian_tokens(
    run: Run, block: Block, states, routes, assigned, visits
) -> HessianTokens | None:
    if CALIBRATION not in states:
        return None
    num_experts = block.config.num_experts
    keep = travel.keep_of(run.keep, block.stack, visits.get(CALIBRATION))
    counted = experts.assign(routes[CALIBRATION], num_experts, keep)
    number = int(processes.total(run.processes, np.asarray(len(counted.rows))))
    return HessianTokens(
        buffer=states[CALIBRATION].updated,
        counted=counted,
        cap=experts.token_cap(number, num_experts, run.quantizer.token_cap),
        routed=np.diff(assigned[CALIBRATION].starts).tolist(),
    )


def _group_size(run: Run) -> int:
    return min(run.halved, default=run.group_size)


def _first(group: ExpertGroup, stop: int) -> ExpertGroup:
    """Those experts of a group that come before expert `stop`."""
    if group.stop <= stop:
        return group
    inside = {name: array[: stop - group.start] for name, array in group.arrays.items()}
    return ExpertGroup(group.start, stop, inside)


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
