# SPDX-License-Identifier: Apache-2.0
"""Which samples go through which version of the model, side by side in one walk."""

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

import numpy as np
from flax.traverse_util import unflatten_dict

from qmoe_jax.calibration import data, walk
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.calibration.text import Samples
from qmoe_jax.calibration.walk import Activations, Params, Routes
from qmoe_jax.checkpoints import array_files
from qmoe_jax.models import config as configs
from qmoe_jax.models.block import Block
from qmoe_jax.models.config import STACKS, Stack, SwitchConfig
from qmoe_jax.runs import devices, snapshots
from qmoe_jax.runs.processes import Processes
from qmoe_jax.runs.snapshots import Snapshot
from qmoe_jax.runs.workers import Worker

# The first three of a compression; of an evaluation the original, and the forms of a checkpoint.
Version: TypeAlias = Literal[
    "original", "round_to_nearest", "compressed", "checkpoint", "dequantized", "packed"
]

CALIBRATION = "calibration"


@dataclasses.dataclass(frozen=True)
class Track:
    """Samples on their way through one version of the model.

    Validation samples have buffers of their own, which no Hessian is ever given.
    """

    name: str
    version: Version
    samples: SampleSet


def make_tracks(samples: Samples, compare_round_to_nearest: bool) -> tuple[Track, ...]:
    """The calibration's track, if there is one, and the validation's, one for each version."""
    tracks = []
    if samples.calibration is not None:
        tracks.append(Track(CALIBRATION, "compressed", samples.calibration))
    if samples.validation is not None:
        versions: list[Version] = ["original", "compressed"]
        if compare_round_to_nearest:
            versions.insert(1, "round_to_nearest")
        tracks += [Track(f"validation-{name}", name, samples.validation) for name in versions]
    return tuple(tracks)


def num_tokens(tracks: Iterable[Track]) -> dict[Stack, int]:
    """Tokens of all samples of some tracks, in each stack."""
    counts: dict[Stack, int] = dict.fromkeys(STACKS, 0)
    for track in tracks:
        for stack, number in tokens_of(track.samples).items():
            counts[stack] += number
    return counts


def tokens_of(samples: SampleSet) -> dict[Stack, int]:
    """Tokens of samples, in each stack."""
    ends = (samples.encoder_offsets[-1], samples.decoder_offsets[-1])
    return {stack: int(end) for stack, end in zip(STACKS, ends, strict=True)}


def followed(tracks: Iterable[Track], states: Mapping[str, Activations]) -> list[Track]:
    """The tracks that still have activations."""
    return [track for track in tracks if track.name in states]


def still_needed(
    config: SwitchConfig, stack: Stack, layer: int, states: Mapping[str, Activations]
) -> Mapping[str, Activations]:
    """The states that are read after a layer: calibration's are not once all experts are solved."""
    if (stack, layer) != configs.last_sparse_layer(config):
        return states
    return {name: state for name, state in states.items() if name != CALIBRATION}


def kept_positions(
    samples: Samples, mask_special_tokens: bool
) -> Mapping[Stack, np.ndarray | None]:
    """For each stack the calibration positions that Hessians count; None: all."""
    if samples.calibration is None or not mask_special_tokens:
        return dict.fromkeys(STACKS)
    masks = data.calibration_masks(samples.calibration, samples.lowest_sentinel_id)
    return dict(zip(STACKS, masks, strict=True))


def params_by_version(
    versions: Iterable[Version], read: Mapping[str, np.ndarray], store_dtype: np.dtype
) -> dict[Version, Params]:
    """Parameters on the default device, nested, for each version of the model.

    The original computes with what was read, all others with what is stored.
    """

    stored = on_device(as_stored(read, store_dtype))
    return {version: on_device(read) if version == "original" else stored for version in versions}


def on_device(params: Mapping[str, np.ndarray]) -> Params:
    """Parameters by path, as the nested dict that modules take."""
    placed = {name: devices.to_device(array) for name, array in params.items()}
    return unflatten_dict(placed, sep="/")


def as_stored(
    read: Mapping[str, np.ndarray], store_dtype: np.dtype, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Uncompressed parameters as they are written, their names after `prefix`."""
    return {f"{prefix}{name}": array.astype(store_dtype) for name, array in read.items()}


@contextlib.contextmanager
def buffer_folder(parent: str | None) -> Generator[pathlib.Path | None]:
    """A folder for one run's buffer files, removed with them; None where they stay in memory."""
    if parent is None:
        yield None
        return
    array_files.local_folder(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qmoe_jax-", dir=parent) as folder:
        yield pathlib.Path(folder)


def kept_buffers(parent: str | None, output: pathlib.Path) -> str | None:
    """How the buffer folders of the run that writes to `output` begin; None: in memory."""
    if parent is None:
        return None
    name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    return str(array_files.local_folder(parent).resolve() / f"qmoe_jax-{name}-")


@contextlib.contextmanager
def kept_buffer_folder(kept: str | None, process: int) -> Generator[pathlib.Path | None]:
    """A folder for a process's buffer files, by `kept_buffers`; None where that is None.

    It is removed when the block ends well, and else there again in the run's next attempt.
    """
    if kept is None:
        yield None
        return
    folder = pathlib.Path(f"{kept}{process}")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # network disks keep open files a while


def share(state: Activations, worker: Worker) -> Activations:
    """The same activations with the batches that are one worker's to run."""
    return dataclasses.replace(state, batches=worker.share(state.batches))


def remove_buffers(
    track: Track,
    stack: Stack,
    buffer_dir: pathlib.Path | None,
    but: pathlib.Path | None = None,
) -> None:
    """Removes the buffer files of a track that an earlier attempt left, but for one."""
    if buffer_dir is not None:
        for file in (buffer_dir / track.name).glob(f"{stack}.*"):
            if file != but:
                file.unlink()


def restore(
    track: Track,
    stack: Stack,
    snapshot: Snapshot,
    width: int,
    dtype: np.dtype,
    *,
    batch_tokens: int,
    processes: Processes,
    buffer_dir: pathlib.Path | None,
    encoded: TokenBuffer | None,
) -> Activations:
    """A track's activations as they were when the snapshot was taken.

    Raises:
      CheckpointError: the snapshot is gone or damaged.
      OSError: the buffers' disk is full.
    """
    snapshots.check_size(snapshot)
    folder = track_folder(track, buffer_dir)
    kept = snapshot.path if processes.alone and snapshot.path.parent == folder else None
    remove_buffers(track, stack, buffer_dir, but=kept)
    state = walk.prepare(
        track.samples,
        stack,
        width,
        dtype,
        batch_tokens=batch_tokens,
        part=(processes.index, processes.count),
        encoded=encoded,
        folder=folder,
        kept=kept,
    )
    if processes.alone:
        snapshots.load(snapshot, state.current.data)
    else:
        snapshots.load_shared(processes, snapshot, state)
    return state


def track_folder(track: Track, buffer_dir: pathlib.Path | None) -> pathlib.Path | None:
    """Where a track's buffer files are, made if need be; None where they stay in memory."""
    if buffer_dir is None:
        return None
    folder = buffer_dir / track.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare(
    track: Track,
    stack: Stack,
    width: int,
    dtype: np.dtype,
    *,
    batch_tokens: int,
    processes: Processes = Processes(),  # noqa: B008, frozen
    buffer_dir: pathlib.Path | None,
    encoded: TokenBuffer | None,
) -> Activations:
    """Room for the track's activations; its buffers are files below `buffer_dir`, if given.

    Raises:
      OSError: the buffers' disk is full.
    """
    return walk.prepare(
        track.samples,
        stack,
        width,
        dtype,
        batch_tokens=batch_tokens,
        part=(processes.index, processes.count),
        encoded=encoded,
        folder=track_folder(track, buffer_dir),
    )


def run_block(
    track: Track,
    layer: int,
    block: Block,
    params: Params,
    layer_params: Params,
    activations: Activations,
    routes: Routes | None = None,
) -> Routes | None:
    """`walk.run_block`, whose errors say which layer and which samples they are about.

    Raises:
      ValueError: an activation is NaN or infinite.
    """
    with named(track, f"{block.stack}/layers_{layer}"):
        return walk.run_block(block, params, layer_params, activations, routes)


@contextlib.contextmanager
def named(track: Track, where: str) -> Iterator[None]:
    """Says of what is found wrong inside, where it was and with which samples."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}, {track.name}: {error}") from error
