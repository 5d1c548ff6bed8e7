# SPDX-License-Identifier: Apache-2.0
"""Masked-span loss of a checkpoint, original or packed, walked block by block as compression does.

The same walk on the same samples: the loss of a packed checkpoint is that which its compression
reported.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import rich.console

from qmoe_jax import report
from qmoe_jax.calibration import data, experts, pipeline, text, walk
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.calibration.text import Text
from qmoe_jax.calibration.walk import Activations, Params, Routes, SampleLosses
from qmoe_jax.checkpoints import array_files, packed, source
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models import config as configs
from qmoe_jax.models import dtypes
from qmoe_jax.models.block import Block, make_block
from qmoe_jax.models.config import STACKS, Stack
from qmoe_jax.runs import devices, progress, tracks, work
from qmoe_jax.runs.compress import Compute
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.tracks import Track


def evaluate(
    checkpoint_path: str,
    text_options: Text,
    *,
    eval_output_dir: str | None = None,
    num_validation_samples: int = 128,
    num_samples: int | None = None,
    compute: Compute = Compute(),  # noqa: B008, frozen
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Loss of a T5X or packed checkpoint on validation samples.

    Args:
      checkpoint_path: what to evaluate.
      text_options: `validation_files`, or those samples of `files` that `compress` held back.
      eval_output_dir: where `evaluation.json` goes; None: nowhere.
      num_validation_samples: how many.
      num_samples: calibration samples that `compress` took first, where it held samples back.
      compute: device and memory.
      dry_run: check the inputs and stop.
      console: where progress goes; None: standard output.

    Returns:
      What `evaluation.json` holds: loss in nats per target token, its standard error over samples.

    Raises:
      ValueError: too little text, or a damaged checkpoint (CheckpointError).
    """
    console = console or rich.console.Console()
    if eval_output_dir and packed.is_packed(array_files.local_folder(eval_output_dir)):
        raise ValueError(
            f"EVAL_OUTPUT_DIR {eval_output_dir} is a packed checkpoint, whose config.gin would be "
            "replaced: choose another folder"
        )
    dtype = dtypes.activation_dtype(compute.activation_dtype)
    scratch = compute.scratch_dir or eval_output_dir or tempfile.gettempdir()
    checkpoint = source.open_source(
        checkpoint_path, memory_budget=compute.read_budget, scratch_dir=pathlib.Path(scratch)
    )
    config = checkpoint.config
    samples = _samples(checkpoint, text_options, num_samples, num_validation_samples)
    track = Track("evaluation", "original", samples)
    console.print(
        f"{checkpoint.path} ({checkpoint.format}): {len(track.samples):,} samples, "
        f"{int(track.samples.decoder_offsets[-1]):,} targets",
        soft_wrap=True,
    )
    if dry_run:
        return {}
    if eval_output_dir:
        pathlib.Path(eval_output_dir).mkdir(parents=True, exist_ok=True)
    total_work = work.whole_run(config, tracks.num_tokens([track]), solved=False)
    with (
        progress.showing(total_work, console) as shown,
        tracks.buffer_folder(compute.buffer_dir) as buffer_dir,
    ):
        losses = walk_blocks(checkpoint, track, dtype, compute, buffer_dir, shown)
    result = _result(checkpoint, samples, losses) | {
        "text": dataclasses.asdict(text_options),
        "activation_dtype": dtype.name,
        "seconds": shown.seconds,
    }
    console.print(f"loss {losses.mean:.4f} ± {losses.standard_error:.4f} nats per target token")
    if eval_output_dir:
        path = pathlib.Path(eval_output_dir) / "evaluation.json"
        array_files.write_text(path, report.to_json(result))
    return result


def _samples(
    checkpoint: Source, text_options: Text, num_samples: int | None, num_validation_samples: int
) -> SampleSet:
    config = checkpoint.config
    held_back = text_options.validation_files is None
    num_calibration = (
        text.num_calibration_samples(config.num_experts, num_samples) if held_back else 0
    )
    samples = text.load(text_options, config.vocab_size, num_calibration, num_validation_samples)
    if samples.validation is None:
        raise ValueError("NUM_VALIDATION_SAMPLES is 0; expected 1 or more")
    if held_back and checkpoint.format == "packed":
        _check_held_back(pathlib.Path(checkpoint.path), samples.validation)
    return samples.validation


def _check_held_back(pack: pathlib.Path, validation: SampleSet) -> None:
    """Samples drawn with other settings would in part be those that the pack was calibrated on."""
    if not (pack / "report.json").exists():
        return
    reported = json.loads((pack / "report.json").read_bytes()).get("samples", {})
    if reported.get("validation", {}).get("fingerprint") != data.fingerprint(validation):
        raise ValueError(
            f"VALIDATION_FILES is None, but these are not the samples that the compression of "
            f"{pack} held back: give the text settings, NUM_SAMPLES and NUM_VALIDATION_SAMPLES of "
            "its config.gin, or set VALIDATION_FILES"
        )


def _result(checkpoint: Source, samples: SampleSet, losses: SampleLosses) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.path,
        "format": checkpoint.format,
        "loss": losses.mean,
        "standard_error": losses.standard_error,
        "samples": len(samples),
        "targets": int(losses.targets.sum()),
        "fingerprint": data.fingerprint(samples),
    }


def walk_blocks(
    checkpoint: Source,
    track: Track,
    dtype: np.dtype,
    compute: Compute,
    buffer_dir: pathlib.Path | None,
    shown: Progress,
) -> SampleLosses:
    """All of the track's samples through all blocks, with the weights as they are stored."""
    config = checkpoint.config
    outer = tracks.on_device(source.outer_params(checkpoint))
    encoded = None
    for stack in STACKS:
        state = None  # frees the encoder's buffers, but for its outputs
        with progress.timed(shown, "dense part"):
            state = tracks.start(
                track,
                stack,
                outer,
                dtype,
                batch_tokens=devices.batch_tokens(compute.batch_tokens),
                buffer_dir=buffer_dir,
                encoded=encoded,
            )
        for layer in range(configs.num_layers(config, stack)):
            state = _walk_block(
                checkpoint, track, stack, layer, outer, state, dtype, compute, shown
            )
        with progress.timed(shown, "dense part"):
            encoded = walk.finish(outer, state, dtype)
    with progress.timed(shown, "losses"):
        return walk.losses(config, outer, state)


def _walk_block(
    checkpoint: Source,
    track: Track,
    stack: Stack,
    layer: int,
    outer: Params,
    state: Activations,
    dtype: np.dtype,
    compute: Compute,
    shown: Progress,
) -> Activations:
    begun = time.perf_counter()
    config = checkpoint.config
    block = make_block(config, stack, layer, dtype)
    params = tracks.on_device(source.layer_params(checkpoint, stack, layer))
    with progress.timed(shown, "dense part"):
        routes = walk.run_block(block, outer, params, state)
    counts = tracks.num_tokens([track])
    tokens = counts[stack]
    where = f"{stack} block {layer + 1} of {configs.num_layers(config, stack)}"
    done = work.dense_part(config, stack, block.sparse, counts)
    if routes is not None:
        with progress.timed(shown, "experts"):
            _run_experts(checkpoint, block, layer, params, state, routes, compute)
        done += work.expert_group(config, config.num_experts, tokens, solved=False)
    spent = time.perf_counter() - begun
    progress.advance(shown, done, where, tokens, spent)
    progress.line(shown, f"{where}: {tokens:,} tokens, {spent:.1f} s")
    return walk.advance(state)


def _run_experts(
    checkpoint: Source,
    block: Block,
    layer: int,
    params: Params,
    state: Activations,
    routes: Routes,
    compute: Compute,
) -> None:
    assigned = experts.assign(routes, block.config.num_experts)
    size = devices.experts_per_group(block.config, compute.experts_per_group)
    with pipeline.read_ahead(checkpoint.expert_groups(block.stack, layer, size)) as groups:
        for group in groups:
            kernels = {name: jnp.asarray(group.arrays.pop(name)) for name in list(group.arrays)}
            experts.run_experts(
                block, params, kernels, group.start, state.updated, routes, assigned
            )
            del kernels  # before the next group comes
