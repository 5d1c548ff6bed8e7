# SPDX-License-Identifier: Apache-2.0
"""What a compression needs to go on after it was stopped, whatever stopped it.

    unfinished/lock       held by the process at work
    unfinished/run.jsonl  what the run is; then a line for each attempt, group of experts and block
    unfinished/process-*  what other processes than the first committed in the block at work
    unfinished/*.bin      the activations after the newest block, and after the encoder's last

All lies in the folder of the packed checkpoint, until that is finished. Packed experts and
parameters are in the store's own journal; here are the records that its report is made of, each
written before what it is about is committed, and the activations that the next block begins with.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from qmoe_jax.calibration.walk import Activations
from qmoe_jax.checkpoints import array_files, packed, packed_manifest
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import Header
from qmoe_jax.models.config import Stack
from qmoe_jax.report import LayerRecord
from qmoe_jax.runs import processes as processes_lib
from qmoe_jax.runs import run_log, snapshots
from qmoe_jax.runs.groups import SolvedGroup
from qmoe_jax.runs.processes import Processes
from qmoe_jax.runs.run_log import Earlier, FinishedBlock

FOLDER = "unfinished"
LOG = "run.jsonl"
LOCK = "lock"

_OWN = "process-*.jsonl"
# What may be there before a run's store is: also a journal that was being written.
_BESIDE = (FOLDER, f"{packed.JOURNAL}.tmp")


def tidy(output: pathlib.Path) -> None:
    """Removes what a run that was stopped in the midst of `finish` left beside its checkpoint.

    Nothing is touched beside anything else than a finished checkpoint, or if other files than a
    run's are there.
    """
    folder = output / FOLDER
    if not (output / packed.MANIFEST).exists() or (folder / LOG).exists() or not folder.is_dir():
        return
    with contextlib.suppress(CheckpointError):
        packed.open_checkpoint(output)
        with _locked(output):
            left = folder.iterdir()
            if all(any(file.match(own) for own in (LOCK, "*.bin", _OWN)) for file in left):
                shutil.rmtree(folder, ignore_errors=True)


def check(output: pathlib.Path) -> None:
    """Checks that a run may begin or go on in a folder.

    Raises:
      CheckpointError: it holds something else, or a finished checkpoint.
    """
    if not (output / FOLDER / LOG).exists():
        packed.check_free(output, beside=_BESIDE)


def check_same(output: pathlib.Path, identity: Mapping[str, Any]) -> bool:
    """Whether a run was begun in a folder; it must be the one of this identity.

    Args:
      output: the folder.
      identity: all that decides the result, by the names that a user knows.

    Raises:
      CheckpointError: naming what differs.
    """
    file = output / FOLDER / LOG
    if not file.exists():
        return False
    was = run_log.lines(file)[0]["run"]
    now = json.loads(json.dumps(identity))
    changed = [f"{k} was {was.get(k)!r}, is {v!r}" for k, v in now.items() if was.get(k) != v]
    if changed:
        raise CheckpointError(
            f"{output} holds an unfinished compression of other settings ({'; '.join(changed)}): "
            "set them as they were to go on with it, or choose another OUTPUT_DIR"
        )
    return True


@contextlib.contextmanager
def attempt(
    output: pathlib.Path,
    header: Header,
    identity: Mapping[str, Any],
    processes: Processes,
    buffers: str | None = None,
) -> Iterator[Earlier]:
    """Begins a run in a folder, or goes on with the one that was begun there.

    Nobody else can do so in the block. `finish` ends the run, and removes the folders whose paths
    begin as `buffers` of any attempt; until then an attempt may follow. All of several processes
    call this; the first alone writes here.

    Raises:
      CheckpointError: see `check` and `check_same`; another process is at work there, or was given
        other settings; the folder cannot be written, or what is in it is damaged.
    """
    file = output / FOLDER / LOG
    _check_alike(processes, identity)
    with contextlib.ExitStack() as held:
        with processes_lib.together(processes, f"opening {output}"):
            if processes.first:
                held.enter_context(_opened(output, header, identity))
        with processes_lib.together(processes, f"opening {output}"):
            store = packed.reopen(output, clean=False)
            earlier = run_log.read(file, store)
            if not processes.first:
                array_files.write_text(_own_file(output, processes), "")
        if processes.first:
            _append(output, {"attempt": earlier.attempts + 1, "buffers": buffers})
        try:
            yield earlier
        except Exception as error:
            if not processes.alone:
                error.add_note("if another process ended first, what it said is the cause")
            error.add_note(f"{output} keeps what is committed: the same command goes on from there")
            raise


def _check_alike(processes: Processes, identity: Mapping[str, Any]) -> None:
    """Checks that all processes were given the same; each of them finds the same fault."""
    own = {**identity, "version of jax": jax.__version__}
    first, *others = processes_lib.gather(processes, own)
    for index, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            changed = [f"{name} is {first.get(name)!r}, {other.get(name)!r}" for name in names]
            raise CheckpointError(
                f"processes 0 and {index} were given different settings ({'; '.join(changed)}): "
                "start all of them with the same ones, and the same text"
            )


@contextlib.contextmanager
def _opened(output: pathlib.Path, header: Header, identity: Mapping[str, Any]) -> Iterator[None]:
    """The folder of a run, made or taken up, with all that processes committed in the store."""
    check(output)
    with _locked(output):
        file = output / FOLDER / LOG
        if not check_same(output, identity):
            array_files.write_text(file, json.dumps({"run": identity}) + "\n")
        if not (output / packed.JOURNAL).exists():
            packed.create(output, header, beside=_BESIDE)
        array_files.drop_cut_line(file)
        _take_over(output)
        store = packed.reopen(output)
        if store.header.config != header.config:
            raise CheckpointError(
                f"{output} holds an unfinished compression of a model of other sizes: choose "
                "another OUTPUT_DIR"
            )
        yield


def commit_group(
    output: pathlib.Path, processes: Processes, stack: Stack, layer: int, solved: SolvedGroup
) -> None:
    """Commits a group of experts; its record is there first.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    group = packed.write_experts(output, stack, layer, solved.start, solved.packed)
    line = packed_manifest.experts_line(stack, layer, group)
    record = run_log.group_record(stack, layer, solved)
    if processes.first:
        _append(output, record)
        packed.commit_line(output, line)
    else:  # one writes to a file
        both = json.dumps({"record": record, "line": line})
        array_files.append_line(_own_file(output, processes), both)


def _own_file(output: pathlib.Path, processes: Processes) -> pathlib.Path:
    return output / FOLDER / f"process-{processes.index}.jsonl"


def _take_over(output: pathlib.Path) -> None:
    """Puts what other processes committed where the first one keeps it, and removes their files.

    Raises:
      CheckpointError: a file of theirs is damaged, or the disk is full.
    """
    files = sorted((output / FOLDER).glob(_OWN))
    known = set((output / packed.JOURNAL).read_text().splitlines())
    for file in files:
        try:
            array_files.drop_cut_line(file)
            lines = [json.loads(text) for text in file.read_text().splitlines()]
            found = {both["line"]: both["record"] for both in lines}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise run_log.damaged(file, error) from error
        for line, record in found.items():
            if line not in known:
                known.add(line)
                _append(output, record)
                packed.commit_line(output, line)
    for file in files:
        file.unlink()


def finish_block(
    output: pathlib.Path,
    processes: Processes,
    stack: Stack,
    layer: int,
    record: LayerRecord | None,
    states: Mapping[str, Activations],
    seconds: Mapping[str, float],
) -> None:
    """Keeps what comes out of a block: a later attempt begins after it.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    folder = output / FOLDER
    suffix = f"{stack}.layers_{layer}.bin"
    files = {name: folder / f"{name}.{suffix}" for name in states}
    if processes.alone:
        buffers = [state.current.data for state in states.values()]
        with ThreadPoolExecutor(max(1, len(states))) as pool:  # disks take a while to answer
            taken = dict(
                zip(states, pool.map(snapshots.take, buffers, files.values()), strict=True)
            )
    else:
        taken = {
            name: snapshots.take_shared(processes, state, files[name])
            for name, state in states.items()
        }
    # By name alone where they lie here: the folder may move before the run goes on.
    here = folder.absolute()
    taken = {
        name: dataclasses.replace(snapshot, file=snapshot.path.name)
        if snapshot.path.parent == here
        else snapshot
        for name, snapshot in taken.items()
    }
    block = FinishedBlock(stack, layer, record, taken, dict(seconds))
    with processes_lib.together(processes, f"finishing {stack}/layers_{layer}"):
        if processes.first:
            _take_over(output)
            _append(output, {"block": dataclasses.asdict(block)})
            for file in folder.glob(f"*.{stack}.layers_*.bin"):
                if not file.name.endswith(f".{suffix}"):
                    file.unlink()
    if not processes.first:
        array_files.write_text(_own_file(output, processes), "")


def finish(output: pathlib.Path) -> None:
    """Removes all this and all attempts' buffers, once the checkpoint is complete and reported."""
    lines = run_log.lines(output / FOLDER / LOG)
    for begin in {line["buffers"] for line in lines if line.get("buffers")}:
        for folder in pathlib.Path(begin).parent.glob(f"{pathlib.Path(begin).name}*"):
            shutil.rmtree(folder, ignore_errors=True)
    (output / FOLDER / LOG).unlink()  # what is left then is of no run
    shutil.rmtree(output / FOLDER, ignore_errors=True)  # network disks keep open files a while


@contextlib.contextmanager
def _locked(output: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out; the system lets go of the lock when this one ends, in any way."""
    folder = output / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written ({error.strerror}): choose another OUTPUT_DIR"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise CheckpointError(
                f"{output} is being written by {handle.read().strip() or 'another process'}: wait "
                "for it, or choose another OUTPUT_DIR"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): see to it that no other process "
                "writes there",
                stacklevel=2,
            )
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def _append(output: pathlib.Path, line: dict[str, Any]) -> None:
    array_files.append_line(output / FOLDER / LOG, json.dumps(line))
