# SPDX-License-Identifier: Apache-2.0
"""Compresses a Switch checkpoint: one walk over its blocks, experts quantized group by group.

The calibration samples go through the compressed model as it comes into being, so that each block
is calibrated on the errors of those before it. The validation samples go through several versions
of the model side by side (the original, the compressed one, round-to-nearest if asked) while a
group's original weights are on the device: all losses from one read of the checkpoint.

Whatever stops a run, the same command goes on after the last group of experts that was committed
(`resume.py`), and ends with the same bytes.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console

from qmoe_jax import report as reports
from qmoe_jax.calibration import text, walk
from qmoe_jax.calibration.text import Samples, Text
from qmoe_jax.calibration.walk import Activations, SampleLosses
from qmoe_jax.checkpoints import array_files, packed, source, vocabulary
from qmoe_jax.checkpoints.packed_manifest import Codec, Header
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models import config as configs
from qmoe_jax.models import dtypes
from qmoe_jax.models.block import make_block
from qmoe_jax.models.config import STACKS, Stack
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import LayerRecord, Report
from qmoe_jax.report_page import page as report_page
from qmoe_jax.runs import (
    dense_parts,
    devices,
    groups,
    layer_experts,
    machine,
    needs,
    processes,
    progress,
    records,
    resume,
    timeline,
    tracks,
    work,
)
from qmoe_jax.runs.compression import Run, VersionParams
from qmoe_jax.runs.groups import Formats
from qmoe_jax.runs.tracks import CALIBRATION, Track


@dataclasses.dataclass(frozen=True)
class Compute:
    """Where and how the work is done.

    Attributes:
      activation_dtype: of activations and buffers; None: bfloat16 where the device computes in it,
        float32 on a CPU.
      experts_per_group: solved together on a device; None: as many as a part of its memory holds.
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
    num_devices: int | None = None,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> Report:
    """Compresses the experts of a checkpoint into a packed store and reports what it cost.

    Args:
      checkpoint_path: a T5X checkpoint (T5X: CHECKPOINT_PATH).
      output_dir: a new folder for the packed checkpoint, its report and its vocabulary; or that of
        the same compression, which was stopped and now goes on.
      text_options: the text and its tokenizer.
      quantizer: method, bits, solver settings.
      compute: device, memory, disk.
      num_samples: calibration samples; None: 78 for each expert of a layer, as in the paper.
      num_validation_samples: for the losses; 0 for none.
      compare_round_to_nearest: also carry the validation samples through round-to-nearest.
      codec: None: `qmoe` for ternary, `uniform` for 2 to 4 bits; `dense` stores dequantized
        kernels.
      store_dtype: of all that is stored and not packed, "bfloat16" or "float32".
      num_devices: of this machine, which work side by side; None: all. Changes no weight.
      dry_run: check the inputs and stop before any weight is read.
      console: where progress goes; None: standard output.

    Raises:
      ValueError: a setting that cannot be, too little text, a damaged checkpoint (CheckpointError).
      OSError: no room for the activation buffers.
    """
    if not processes.here().first:
        console = rich.console.Console(quiet=True)
    console = console or rich.console.Console()
    formats = Formats(
        codec=groups.check_storable(quantizer, codec),
        store_dtype=dtypes.float_dtype(store_dtype, "STORE_DTYPE"),
        dtype=dtypes.activation_dtype(compute.activation_dtype),
    )
    output = array_files.local_folder(output_dir)
    if not dry_run:
        resume.tidy(output)
    resume.check(output)
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
        num_devices=num_devices,
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
    num_devices: int | None = None,
    dry_run: bool,
    console: rich.console.Console,
) -> Report:
    """`compress` for an opened checkpoint and finished samples; `text_settings` say whence."""
    chosen, all_processes = devices.chosen(num_devices), processes.here()
    group_size = devices.experts_per_group(
        original.config,
        compute.experts_per_group,
        len(chosen) * all_processes.count,
        grid=quantizer.grid,
    )
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
    followed = tracks.make_tracks(samples, compare_round_to_nearest and quantizer.method != "rtn")
    report = records.begin(original, samples, settings)
    identity = records.identity(report, followed, devices.batch_tokens(compute.batch_tokens))
    output = pathlib.Path(output_dir)
    console.print(reports.introduction(report), soft_wrap=True)
    if all_processes.alone and not (output / resume.FOLDER).exists():
        _check_room(original, samples, followed, quantizer, formats, compute, group_size, output)
    if dry_run:
        begun = resume.check_same(output, identity)
        left = "; a run that was stopped would go on" if begun else ""
        console.print(f"dry run: inputs are sound, nothing was written{left}", soft_wrap=True)
        return report
    header = Header(original.config, formats.codec, settings, report.checkpoint)
    kept = tracks.kept_buffers(compute.buffer_dir, output)
    with (
        resume.attempt(output, header, identity, all_processes, kept) as earlier,
        tracks.kept_buffer_folder(kept, all_processes.index) as buffer_dir,
        progress.showing(_total_work(original.config, followed), console) as shown,
    ):
        if samples.vocabulary is not None and all_processes.first:
            vocabulary.keep(samples.vocabulary, output)
        shown.seconds.update(earlier.seconds)
        run = Run(
            original=original,
            output=output,
            earlier=earlier,
            quantizer=quantizer,
            formats=formats,
            tracks=followed,
            keep=tracks.kept_positions(samples, quantizer.mask_special_tokens),
            group_size=group_size,
            halved=[],
            devices=chosen,
            processes=all_processes,
            batch_tokens=devices.batch_tokens(compute.batch_tokens),
            buffer_dir=buffer_dir,
            shown=shown,
        )
        layers, losses = compress_blocks(run)
        report = _report(run, report, layers, losses)
    console.print(reports.summary(report))
    return report


def _check_room(
    original: Source,
    samples: Samples,
    followed: Sequence[Track],
    quantizer: Quantizer,
    formats: Formats,
    compute: Compute,
    group_size: int,
    output: pathlib.Path,
) -> None:
    """Refuses what certainly does not fit, before anything is read; `plan` tells more."""
    none: dict[Stack, int] = dict.fromkeys(STACKS, 0)
    sets = {"calibration": samples.calibration, "validation": samples.validation}
    tokens = {name: tracks.tokens_of(found) if found else none for name, found in sets.items()}
    how = needs.How(
        quantizer=quantizer,
        codec=formats.codec,
        activation_bytes=formats.dtype.itemsize,
        store_bytes=formats.store_dtype.itemsize,
        source_bytes=needs.stored_bytes(original),
        group_size=group_size,
        batch_tokens=devices.batch_tokens(compute.batch_tokens),
        num_devices=1,
        mapped=compute.buffer_dir is not None,
    )
    versions = sum(track.name != CALIBRATION for track in followed)
    work_wanted = needs.Work(tokens["calibration"], tokens["validation"], versions)
    needed = needs.needs(original.config, work_wanted, how, original.chunk_room())
    found = machine.detect(None, str(output), compute.buffer_dir, compute.scratch_dir)
    if lacking := needs.lacking(needed, found, certain=True):
        raise ValueError(f"this does not fit. {'; '.join(lacking)} (--run_mode=plan tells more)")


def _report(
    run: Run, report: Report, layers: list[LayerRecord], losses: dict[str, SampleLosses]
) -> Report:
    """Finishes the checkpoint and all that lies beside it."""
    shown, output = run.shown, run.output
    with processes.together(run.processes, f"finishing {output}"):
        if run.processes.first:
            packed.finish(output)
    nbytes = packed.open_checkpoint(output).nbytes
    report = records.finish(report, layers, losses, nbytes, shown)
    report.machine.update(
        attempts=run.earlier.attempts + 1,
        processes=run.processes.count,
        halved_groups=run.halved,
        overlap=timeline.overlap(shown.spans),  # of this attempt and process
    )
    with processes.together(run.processes, f"finishing {output}"):
        if run.processes.first:
            timeline.save(shown.spans, output)
            report_page.save(report, output)
            resume.finish(output)
    return report


def compress_blocks(run: Run) -> tuple[list[LayerRecord], dict[str, SampleLosses]]:
    """The walk: encoder, then decoder. Returns the sparse layers' records and the losses."""
    config = run.original.config
    layers = {(r.stack, r.layer): r for r in run.earlier.layers}
    read = source.outer_params(run.original)
    source.check_finite(run.original, read)
    _commit_params(run, "outer", tracks.as_stored(read, run.formats.store_dtype))
    outer = dense_parts.params_on_each(run, read)
    followed, encoded, states = run.tracks, {}, {}
    for stack in STACKS:
        states = {}  # frees the encoder's buffers, but for its outputs
        first, states = dense_parts.begin(run, stack, followed, outer, encoded)
        for layer in range(first, configs.num_layers(config, stack)):
            states, record = compress_block(run, stack, layer, outer, states)
            if record is not None:
                layers[stack, layer] = record
        followed = tracks.followed(run.tracks, states)
        with progress.timed(run.shown, "dense part"):
            encoded = dense_parts.finish(run, followed, outer, states)
    with progress.timed(run.shown, "losses"):
        losses = {t.version: dense_parts.losses(run, t, outer, states[t.name]) for t in followed}
    return list(layers.values()), losses


def compress_block(
    run: Run,
    stack: Stack,
    layer: int,
    outer: list[VersionParams],
    states: Mapping[str, Activations],
) -> tuple[dict[str, Activations], LayerRecord | None]:
    """One block: the dense part, then its experts, if it has any; committed at the end."""
    begun = time.perf_counter()
    config = run.original.config
    block = make_block(config, stack, layer, run.formats.dtype)
    read = source.layer_params(run.original, stack, layer)
    source.check_finite(run.original, read, f"{stack}/layers_{layer}/")
    params = dense_parts.params_on_each(run, read)
    with progress.timed(run.shown, "dense part"):
        routes = dense_parts.run_block(run, block, layer, outer, params, states)
    where = f"{stack} block {layer + 1} of {configs.num_layers(config, stack)}"
    counts = tracks.num_tokens(run.tracks)
    tokens, done = counts[stack], work.dense_part(config, stack, block.sparse, counts)
    progress.advance(run.shown, done, where, tokens, time.perf_counter() - begun)
    record = None
    if block.sparse:
        record = layer_experts.compress_experts(run, block, layer, params, states, routes, where)
    stored = tracks.as_stored(read, run.formats.store_dtype, f"{stack}/layers_{layer}/")
    _commit_params(run, f"{stack}.layers_{layer}", stored)
    left = tracks.still_needed(config, stack, layer, states)
    states = {name: walk.advance(state) for name, state in left.items()}
    with progress.timed(run.shown, timeline.SNAPSHOTS):
        resume.finish_block(
            run.output, run.processes, stack, layer, record, states, run.shown.seconds
        )
    progress.line(run.shown, f"{where}: {tokens:,} tokens, {time.perf_counter() - begun:.1f} s")
    return states, record


def _commit_params(run: Run, name: str, stored: dict[str, np.ndarray]) -> None:
    """Commits parameters, unless an earlier attempt has: then they must be the same."""
    if stored.keys() <= run.earlier.store.params.keys():
        packed.check_params(run.earlier.store, stored, f"CHECKPOINT_PATH {run.original.path}")
    elif run.processes.first:
        packed.commit_params(run.output, name, stored)


def _total_work(config, followed: tuple[Track, ...]) -> float:
    solved = any(track.name == CALIBRATION for track in followed)
    return work.whole_run(config, tracks.num_tokens(followed), solved)
