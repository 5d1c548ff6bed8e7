# SPDX-License-Identifier: Apache-2.0
"""What all samples go through beside the experts: embeddings, dense parts, norms, losses.

Each device takes its share of the batches. All write to the same buffers, at different rows.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qmoe_jax.calibration import walk
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.walk import Activations, Routes, SampleLosses
from qmoe_jax.models import config as configs
from qmoe_jax.models.block import Block
from qmoe_jax.models.config import Stack
from qmoe_jax.runs import processes, progress, tracks, travel, work, workers
from qmoe_jax.runs.compression import Run, VersionParams
from qmoe_jax.runs.run_log import FinishedBlock
from qmoe_jax.runs.tracks import CALIBRATION, Track, Version
from qmoe_jax.runs.workers import Worker


def begin(
    run: Run, stack: Stack, followed: Sequence[Track], outer: list[VersionParams], encoded
) -> tuple[int, dict[str, Activations]]:
    """The first block to walk and its inputs: after the newest finished block, or the embeddings.

    What an earlier attempt left of the activations is checked; where it is damaged or gone, the
    stack is walked from its start, and what is committed is not solved again.
    """
    newest = run.earlier.newest(stack)
    if newest is not None:
        try:
            with processes.together(run.processes, "going on"):
                states = _restore(run, newest, followed, encoded)
        except (OSError, ValueError) as error:
            walked = f"walking the {stack} again, without solving what is committed"
            run.shown.console.print(f"{error}: {walked}", soft_wrap=True)
        else:
            layers = configs.num_layers(run.original.config, stack)
            counts = tracks.num_tokens(run.tracks)
            solved = any(track.name == CALIBRATION for track in run.tracks)
            of = run.original.config, stack, range(newest.layer + 1), counts, solved
            progress.skip(run.shown, work.blocks(*of))
            where = f"{stack} block {newest.layer + 1} of {layers}"
            run.shown.console.print(f"going on after {where}", soft_wrap=True)
            return newest.layer + 1, states
    with progress.timed(run.shown, "dense part"):
        states = {t.name: _prepare(run, t, stack, encoded) for t in followed}

        def embed(worker: Worker) -> None:
            for t in followed:
                walk.embed(outer[worker.place][t.version], tracks.share(states[t.name], worker))

        workers.on_each(run.devices, embed)
        return 0, states


def run_block(
    run: Run,
    block: Block,
    layer: int,
    outer: list[VersionParams],
    params: list[VersionParams],
    states: Mapping[str, Activations],
) -> dict[str, Routes]:
    """All tracks through all but the experts of a block; where a sparse one sends their tokens."""
    followed = tracks.followed(run.tracks, states)
    routes = {t.name: walk.no_routes(states[t.name]) for t in followed} if block.sparse else {}

    def share(worker: Worker) -> None:
        for t in followed:
            tracks.run_block(
                t,
                layer,
                block,
                outer[worker.place][t.version],
                params[worker.place][t.version],
                tracks.share(states[t.name], worker),
                routes.get(t.name),
            )

    workers.on_each(run.devices, share)
    return routes


def finish(
    run: Run,
    followed: Sequence[Track],
    outer: list[VersionParams],
    states: Mapping[str, Activations],
) -> dict[str, TokenBuffer]:
    """The stack's normed outputs, by track."""

    def share(worker: Worker) -> None:
        for t in followed:
            own = tracks.share(states[t.name], worker)
            last = configs.num_layers(run.original.config, own.stack) - 1
            with tracks.named(t, f"{own.stack}/layers_{last}"):
                walk.finish(outer[worker.place][t.version], own, run.formats.dtype)

    workers.on_each(run.devices, share)
    return {t.name: _following(run, states[t.name]) for t in followed}


def _following(run: Run, state: Activations) -> TokenBuffer:
    """A stack's outputs at the process that needs them: the encoder's, where their samples go."""
    if run.processes.alone or state.stack == "decoder":
        return state.updated
    count = run.processes.count
    owners = walk.owners(state.samples, "decoder", run.batch_tokens, count)
    return travel.follow_samples(state, state.updated, owners, run.processes.index)


def losses(run: Run, track: Track, outer: list[VersionParams], state: Activations) -> SampleLosses:
    """Of one track, from the decoder's finished output."""

    def share(worker: Worker) -> SampleLosses:
        params = outer[worker.place][track.version]
        with tracks.named(track, "logits"):
            return walk.losses(run.original.config, params, tracks.share(state, worker))

    parts = workers.on_each(run.devices, share)
    total = np.sum([part.total for part in parts], axis=0)
    return SampleLosses(processes.total(run.processes, total), parts[0].targets)


def params_on_each(run: Run, read: Mapping[str, np.ndarray]) -> list[VersionParams]:
    """Parameters for every version of the model, on every device."""
    versions, dtype = _versions(run), run.formats.store_dtype
    return workers.on_each(
        run.devices, lambda worker: tracks.params_by_version(versions, read, dtype)
    )


def _prepare(run: Run, track: Track, stack: Stack, encoded) -> Activations:
    tracks.remove_buffers(track, stack, run.buffer_dir)
    return tracks.prepare(
        track,
        stack,
        run.original.config.emb_dim,
        run.formats.dtype,
        batch_tokens=run.batch_tokens,
        processes=run.processes,
        buffer_dir=run.buffer_dir,
        encoded=encoded.get(track.name),
    )


def _restore(
    run: Run, newest: FinishedBlock, followed: Iterable[Track], encoded
) -> dict[str, Activations]:
    """What comes out of a finished block, for those tracks that are still needed after it."""
    return {
        track.name: tracks.restore(
            track,
            newest.stack,
            newest.snapshots[track.name],
            run.original.config.emb_dim,
            run.formats.dtype,
            batch_tokens=run.batch_tokens,
            processes=run.processes,
            buffer_dir=run.buffer_dir,
            encoded=encoded.get(track.name),
        )
        for track in followed
        if track.name in newest.snapshots
    }


def _versions(run: Run) -> set[Version]:
    return {"compressed", *(track.version for track in run.tracks)}
