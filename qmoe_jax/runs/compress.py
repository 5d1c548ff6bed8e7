# SPDX-License-Identifier: Apache-2.0
"""Compresses a Switch checkpoint: one walk over its blocks, experts quantized group by group.

The calibration samples go through the compressed model as it comes into being, so that each block
is calibrated on the errors of those before it. The validation samples go through several versions
of the model side by side (the original, the compressed one, round-to-nearest if asked) while a
group's original weights are on the device: all losses from one read of the checkpoint.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import rich.console

from qmoe_jax import report as reports
from qmoe_jax.calibration import experts, pipeline, text, walk
from qmoe_jax.calibration.text import Samples, Text
from qmoe_jax.calibration.walk import Activations, Params, Routes, SampleLosses
from qmoe_jax.checkpoints import array_files, packed, source, vocabulary
from qmoe_jax.checkpoints.packed_manifest import Codec, Header
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.checkpoints.t5x_experts import ExpertGroup
from qmoe_jax.models import config as configs
from qmoe_jax.models import dtypes
from qmoe_jax.models.block import Block, make_block
from qmoe_jax.models.config import STACKS, Stack
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import LayerRecord, Report
from qmoe_jax.report_page import page as report_page
from qmoe_jax.runs import devices, groups, progress, records, tracks, work
from qmoe_jax.runs.groups import Formats, HessianTokens, SolvedGroup
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.tracks import CALIBRATION, Track, Version


@dataclasses.dataclass(frozen=True)
class Compute:
    """Where and how the work is done.

    Attributes:
      activation_dtype: of activations and buffers; None: bfloat16 where the device computes in it,
        float32 on a CPU.
      experts_per_group: solved together; None: as many as a part of the device's memory holds.
        Changes no level.
      batch_tokens: padded positions in one batch of the dense part; None: 1,024 on a CPU, 8,192 on
        an accelerator.
      buffer_dir: folder for memory-mapped activation buffers; None keeps them in memory.
      scratch_dir: folder for re-chunking experts where their chunks exceed `read_budget`; None:
        the output folder.
      read_budget: bytes of host memory that chunks of the checkpoint may take.
    """

    activation_dtype: str | None = None
    experts_per_group: int | None = None
    batch_tokens: int | None = None
    buffer_dir: str | None = None
    scratch_dir: str | None = None
    read_budget: int = 4 << 30

    def __post_init__(self):
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"BATCH_TOKENS is {self.batch_tokens}; expected 1 or more")
        if self.read_budget < 0:
            raise ValueError(f"READ_BUDGET is {self.read_budget}; expected 0 bytes or more")


@dataclasses.dataclass(frozen=True)
class Run:
    """What all steps of one compression share."""

    original: Source
    output: pathlib.Path
    quantizer: Quantizer
    formats: Formats
    tracks: tuple[Track, ...]
    keep: Mapping[Stack, np.ndarray | None]  # positions that the Hessians count
    group_size: int  # experts
    batch_tokens: int
    buffer_dir: pathlib.Path | None
    shown: Progress


def compress(
    checkpoint_path: str,
    output_dir: str,
    text_options: Text,
    *,
    quantizer: Quantizer = Quantizer(),  # noqa: B008, frozen
    compute: Compute = Compute(),
    num_samples: int | None = None,
    num_validation_samples: int = 128,
    compare_round_to_nearest: bool = False,
    codec: Codec | None = None,
    store_dtype: str = "bfloat16",
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> Report:
    """Compresses the experts of a checkpoint into a packed store and reports what it cost.

    Args:
      checkpoint_path: a T5X checkpoint (T5X: CHECKPOINT_PATH).
      output_dir: a new folder for the packed checkpoint, its report and its vocabulary.
      text_options: the text and its tokenizer.
      quantizer: method, bits, solver settings.
      compute: device, memory, disk.
      num_samples: calibration samples; None: 78 for each expert of a layer, as in the paper.
      num_validation_samples: for the losses; 0 for none.
      compare_round_to_nearest: also carry the validation samples through round-to-nearest.
      codec: None: `qmoe` for ternary, `uniform` for 2 to 4 bits; `dense` stores dequantized
        kernels.
      store_dtype: of all that is stored and not packed, "bfloat16" or "float32".
      dry_run: check the inputs and stop before any weight is read.
      console: where progress goes; None: standard output.

    Raises:
      ValueError: a setting that cannot be, too little text, a damaged checkpoint (CheckpointError).
      OSError: no room for the activation buffers.
    """
    console = console or rich.console.Console()
    formats = Formats(
        codec=groups.check_storable(quantizer, codec),
        store_dtype=dtypes.float_dtype(store_dtype, "STORE_DTYPE"),
        dtype=dtypes.activation_dtype(compute.activation_dtype),
    )
    packed.check_free(array_files.local_folder(output_dir))
    original = source.open_source(
        checkpoint_path,
        memory_budget=compute.read_budget,
        scratch_dir=pathlib.Path(compute.scratch_dir or output_dir),
    )
    vocab_size = original.config.vocab_size
    if original.format == "packed":
        raise ValueError(f"CHECKPOINT_PATH {checkpoint_path} is a packed checkpoint already")
    wanted = text.num_calibration_samples(original.config.num_experts, num_samples)
    if quantizer.method == "rtn" and text_options.validation_files is not None:
        wanted = 0  # nothing is calibrated; held-back samples come after as many as ever
    samples = text.load(text_options, vocab_size, wanted, num_validation_samples)
    return compress_samples(
        original,
        samples,
        output_dir,
        quantizer=quantizer,
        formats=formats,
        compute=compute,
        compare_round_to_nearest=compare_round_to_nearest,
        text_settings=dataclasses.asdict(text_options),
        dry_run=dry_run,
        console=console,
    )


def compress_samples(
    original: Source,
    samples: Samples,
    output_dir: str,
    *,
    quantizer: Quantizer,
    formats: Formats,
    compute: Compute,
    compare_round_to_nearest: bool,
    text_settings: dict[str, Any],
    dry_run: bool,
    console: rich.console.Console,
) -> Report:
    """`compress` for an opened checkpoint and finished samples; `text_settings` say whence."""
    group_size = devices.experts_per_group(original.config, compute.experts_per_group)
    if quantizer.method == "rtn":
        samples = dataclasses.replace(samples, calibration=None)
    settings = {
        "quantizer": dataclasses.asdict(quantizer),
        "text": text_settings,
        "compute": dataclasses.asdict(compute),
        "codec": formats.codec,
        "store_dtype": formats.store_dtype.name,
        "activation_dtype": formats.dtype.name,
    }
    report = records.begin(original, samples, settings)
    console.print(reports.introduction(report), soft_wrap=True)
    if dry_run:
        console.print("dry run: inputs are sound, nothing was written")
        return report
    output = pathlib.Path(output_dir)
    packed.create(output, Header(original.config, formats.codec, settings, report.checkpoint))
    if samples.vocabulary is not None:
        vocabulary.keep(samples.vocabulary, output)
    followed = tracks.make_tracks(samples, compare_round_to_nearest and quantizer.method != "rtn")
    with (
        progress.showing(_total_work(original.config, followed), console) as shown,
        tracks.buffer_folder(compute.buffer_dir) as buffer_dir,
    ):
        run = Run(
            original=original,
            output=output,
            quantizer=quantizer,
            formats=formats,
            tracks=followed,
            keep=tracks.kept_positions(samples, quantizer.mask_special_tokens),
            group_size=group_size,
            batch_tokens=devices.batch_tokens(compute.batch_tokens),
            buffer_dir=buffer_dir,
            shown=shown,
        )
        layers, losses = compress_blocks(run)
        store = packed.finish(output)
    report = records.finish(report, layers, losses, store.nbytes, shown)
    report_page.save(report, output)
    console.print(reports.summary(report))
    return report


def compress_blocks(run: Run) -> tuple[list[LayerRecord], dict[str, SampleLosses]]:
    """The walk: encoder, then decoder. Returns the sparse layers' records and the losses."""
    config = run.original.config
    layers: list[LayerRecord] = []
    read = source.outer_params(run.original)
    source.check_finite(run.original, read)
    packed.commit_params(run.output, "outer", tracks.as_stored(read, run.formats.store_dtype))
    outer = tracks.params_by_version(_versions(run), read, run.formats.store_dtype)
    followed, encoded, states = run.tracks, {}, {}
    for stack in STACKS:
        states = {}  # frees the encoder's buffers, but for its outputs
        with progress.timed(run.shown, "dense part"):
            states = {t.name: _start(run, t, stack, outer[t.version], encoded) for t in followed}
        for layer in range(configs.num_layers(config, stack)):
            states, record = compress_block(run, stack, layer, outer, states)
            if record is not None:
                layers.append(record)
        followed = tracks.followed(run.tracks, states)
        with progress.timed(run.shown, "dense part"):
            for t in followed:
                encoded[t.name] = walk.finish(outer[t.version], states[t.name], run.formats.dtype)
    with progress.timed(run.shown, "losses"):
        losses = {
            t.version: walk.losses(config, outer[t.version], states[t.name]) for t in followed
        }
    return layers, losses


def compress_block(
    run: Run,
    stack: Stack,
    layer: int,
    outer: Mapping[Version, Params],
    states: Mapping[str, Activations],
) -> tuple[dict[str, Activations], LayerRecord | None]:
    """One block: the dense part, then its experts, if it has any; committed at the end."""
    begun = time.perf_counter()
    config = run.original.config
    block = make_block(config, stack, layer, run.formats.dtype)
    read = source.layer_params(run.original, stack, layer)
    source.check_finite(run.original, read, f"{stack}/layers_{layer}/")
    params = tracks.params_by_version(_versions(run), read, run.formats.store_dtype)
    routes: dict[str, Routes] = {}
    with progress.timed(run.shown, "dense part"):
        for t in tracks.followed(run.tracks, states):
            found = walk.run_block(block, outer[t.version], params[t.version], states[t.name])
            if found is not None:
                routes[t.name] = found
    where = f"{stack} block {layer + 1} of {configs.num_layers(config, stack)}"
    counts = tracks.num_tokens(run.tracks)
    tokens, done = counts[stack], work.dense_part(config, stack, block.sparse, counts)
    progress.advance(run.shown, done, where, tokens, time.perf_counter() - begun)
    record = None
    if block.sparse:
        record = compress_experts(run, block, layer, params, states, routes, where)
    stored = tracks.as_stored(read, run.formats.store_dtype, f"{stack}/layers_{layer}/")
    packed.commit_params(run.output, f"{stack}.layers_{layer}", stored)
    progress.line(run.shown, f"{where}: {tokens:,} tokens, {time.perf_counter() - begun:.1f} s")
    left = tracks.still_needed(config, stack, layer, states)
    return {name: walk.advance(state) for name, state in left.items()}, record


def compress_experts(
    run: Run,
    block: Block,
    layer: int,
    params: Mapping[Version, Params],
    states: Mapping[str, Activations],
    routes: Mapping[str, Routes],
    where: str,
) -> LayerRecord:
    """All experts of a sparse block, a group at a time; the next one is read meanwhile."""
    begun = time.perf_counter()
    assigned = {
        name: experts.assign(found, block.config.num_experts) for name, found in routes.items()
    }
    tokens = _hessian_tokens(run, block, states, routes, assigned)
    read = run.original.expert_groups(block.stack, layer, run.group_size)
    followed = tracks.followed(
        run.tracks, tracks.still_needed(block.config, block.stack, layer, states)
    )

    def pack(group: ExpertGroup, quantized: Mapping[str, Quantized]) -> SolvedGroup:
        with progress.timed(run.shown, "pack, beside the rest"):
            result = groups.pack(run.quantizer, run.formats, group, quantized, tokens)
            packed.commit_experts(run.output, block.stack, layer, group.start, result.packed)
            return dataclasses.replace(result, packed={})

    def compress_group(group: ExpertGroup) -> Future[SolvedGroup]:
        """A function of its own, so that no group is on the device when the next one comes."""
        started = time.perf_counter()
        quantized, original, compressed = groups.solve(
            run.quantizer,
            run.formats,
            block,
            layer,
            params["compressed"],
            group,
            tokens,
            run.shown,
        )
        packing = write(pack, group, quantized)
        kernels = {"original": original, "compressed": compressed}
        if "round_to_nearest" in params:
            kernels["round_to_nearest"] = groups.nearest_kernels(
                run.quantizer, run.formats, original
            )
        with progress.timed(run.shown, "expert forward"):
            _run_group(followed, block, params, kernels, group, states, routes, assigned)
        routed = sum(int(a.starts[group.stop] - a.starts[group.start]) for a in assigned.values())
        done = work.expert_group(block.config, group.stop - group.start, routed, tokens is not None)
        spent = time.perf_counter() - started
        progress.advance(run.shown, done, f"{where}, expert {group.stop}", routed, spent)
        return packing

    with pipeline.read_ahead(read) as ahead, pipeline.write_behind(depth=1) as write:
        packing = []
        while (group := _next(ahead, run.shown)) is not None:
            packing.append(compress_group(group))
    solved = [future.result() for future in packing]
    return groups.layer_record(block.stack, layer, solved, time.perf_counter() - begun)


def _run_group(followed, block, params, kernels, group, states, routes, assigned) -> None:
    """Every track's tokens through its version of the group's experts."""
    for track in followed:
        experts.run_experts(
            block,
            params[track.version],
            kernels[track.version],
            group.start,
            states[track.name].updated,
            routes[track.name],
            assigned[track.name],
        )


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


def _next(ahead: Iterator[ExpertGroup], shown: Progress) -> ExpertGroup | None:
    with progress.timed(shown, "wait for read"):
        return next(ahead, None)


def _versions(run: Run) -> set[Version]:
    return {"compressed", *(track.version for track in run.tracks)}


def _start(run: Run, track: Track, stack: Stack, params: Params, encoded) -> Activations:
    return tracks.start(
        track,
        stack,
        params,
        run.formats.dtype,
        batch_tokens=run.batch_tokens,
        buffer_dir=run.buffer_dir,
        encoded=encoded.get(track.name),
    )


def _total_work(config, followed: tuple[Track, ...]) -> float:
    solved = any(track.name == CALIBRATION for track in followed)
    return work.whole_run(config, tracks.num_tokens(followed), solved)
