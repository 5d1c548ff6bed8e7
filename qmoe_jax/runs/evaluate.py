# SPDX-License-Identifier: Apache-2.0
"""Masked-span losses of a checkpoint, by corpus, walked block by block as compression does.

The same walk on the same samples: the loss of a packed checkpoint is that which its compression
reported. The original and the packed weights themselves may be evaluated beside it.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console

from qmoe_jax import report
from qmoe_jax.calibration import data, text
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.calibration.text import Text
from qmoe_jax.calibration.walk import SampleLosses
from qmoe_jax.checkpoints import array_files, packed, source, vocabulary
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models import config as configs
from qmoe_jax.models import dtypes
from qmoe_jax.runs import evaluation, forward, progress
from qmoe_jax.runs.compress import Compute
from qmoe_jax.runs.evaluation import ALL, Corpus
from qmoe_jax.runs.forward import PACKED, Walk
from qmoe_jax.runs.tracks import Track, Version

ONE_CORPUS = "validation"  # the name of text that is given without one
ORIGINAL: Version = "original"
FORMS: tuple[Version, ...] = ("dequantized", PACKED)  # of a packed checkpoint
WHOLE: tuple[Version, ...] = ("checkpoint",)  # of any other


class _Pass(NamedTuple):
    """A checkpoint that is walked once, and what it is evaluated as."""

    checkpoint: Source
    store: PackedCheckpoint | None  # the same, where its packed weights are asked for
    versions: tuple[Version, ...]


def evaluate(
    checkpoint_path: str,
    text_options: Text,
    *,
    original_checkpoint_path: str | None = None,
    packed_models: Sequence[str] | str | None = None,
    eval_output_dir: str | None = None,
    num_validation_samples: int = 128,
    num_samples: int | None = None,
    compute: Compute = Compute(),  # noqa: B008, frozen
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Losses of a T5X or packed checkpoint, or a Hugging Face folder, on validation samples.

    Args:
      checkpoint_path: what to evaluate.
      text_options: `validation_files`, all as one corpus or a dict of corpora, or those samples of
        `files` that `compress` held back.
      original_checkpoint_path: the uncompressed checkpoint, to be compared with on the same
        samples.
      packed_models: what a packed checkpoint is evaluated as: "dequantized", by the dense matrices
        that it stands for, "packed", by the kernels that compute from packed weights, or both.
        None: "dequantized". Must be None for other checkpoints.
      eval_output_dir: where `evaluation.json` goes; None: nowhere.
      num_validation_samples: how many, of each corpus.
      num_samples: calibration samples that `compress` took first, where it held samples back.
      compute: device and memory.
      dry_run: check the inputs and stop.
      console: where progress goes; None: standard output.

    Returns:
      What `evaluation.json` holds: losses in nats per target token with their standard errors over
      samples, of all corpora together and of each; differences from the first model with those of
      the differences; `loss` and `standard_error` are those of `checkpoint_path` on all corpora, of
      its first model.

    Raises:
      ValueError: a setting that cannot be, too little text, or a damaged checkpoint
        (CheckpointError).
    """
    console = console or rich.console.Console()
    if eval_output_dir is not None and packed.is_packed(array_files.local_folder(eval_output_dir)):
        raise ValueError(
            f"EVAL_OUTPUT_DIR {eval_output_dir} is a packed checkpoint, whose config.gin would be "
            "replaced: choose another folder"
        )
    dtype = dtypes.activation_dtype(compute.activation_dtype)
    scratch = compute.scratch_dir or eval_output_dir or tempfile.gettempdir()
    open_source = functools.partial(
        source.open_source, memory_budget=compute.read_budget, scratch_dir=pathlib.Path(scratch)
    )
    own = _own_pass(open_source(checkpoint_path), packed_models)
    checkpoint, passes = own.checkpoint, [own]
    if original_checkpoint_path is not None:
        original = open_source(original_checkpoint_path)
        _check_original(original, checkpoint)
        passes.insert(0, _Pass(original, None, (ORIGINAL,)))
    if text_options.sentencepiece_model_file is None:
        text_options = dataclasses.replace(
            text_options, sentencepiece_model_file=vocabulary.kept(checkpoint.path)
        )
    samples = _samples(checkpoint, text_options, num_samples, num_validation_samples)
    console.print(_introduction(passes, samples), soft_wrap=True, markup=False)
    if dry_run:
        return {}
    if eval_output_dir:
        pathlib.Path(eval_output_dir).mkdir(parents=True, exist_ok=True)
    corpora, seconds = _walk(passes, samples, dtype, compute, console)
    result = _result(passes, corpora) | {
        "text": dataclasses.asdict(text_options),
        "activation_dtype": dtype.name,
        "seconds": seconds,
    }
    console.print(evaluation.table(corpora))
    if eval_output_dir:
        path = pathlib.Path(eval_output_dir) / "evaluation.json"
        array_files.write_text(path, report.to_json(result))
    return result


def _own_pass(checkpoint: Source, packed_models: Sequence[str] | str | None) -> _Pass:
    """What CHECKPOINT_PATH is evaluated as."""
    if packed_models is None:
        own = FORMS[:1] if checkpoint.format == "packed" else WHOLE
        return _Pass(checkpoint, None, own)
    names = (packed_models,) if isinstance(packed_models, str) else tuple(packed_models)
    versions: tuple[Version, ...] = tuple(f for name in names for f in FORMS if f == name)
    if not names or len(set(versions)) != len(names):
        raise ValueError(
            f"PACKED_MODELS is {packed_models!r}; expected {FORMS[0]!r}, {PACKED!r} or a list of "
            "both"
        )
    if checkpoint.format != "packed":
        raise ValueError(
            f"PACKED_MODELS is {packed_models!r}, but CHECKPOINT_PATH {checkpoint.path} is not "
            f"packed ({checkpoint.format}): leave PACKED_MODELS out"
        )
    if PACKED not in versions:
        return _Pass(checkpoint, None, versions)
    store = packed.open_checkpoint(pathlib.Path(checkpoint.path))
    if store.header.codec == "dense":
        raise ValueError(
            f"PACKED_MODELS is {packed_models!r}, but the experts of {checkpoint.path} are stored "
            f"dense (CODEC='dense'): expected {FORMS[0]!r}"
        )
    return _Pass(checkpoint, store, versions)


def _check_original(original: Source, checkpoint: Source) -> None:
    if original.format == "packed":
        raise ValueError(
            f"ORIGINAL_CHECKPOINT_PATH {original.path} is a packed checkpoint; expected the one "
            f"that {checkpoint.path} was made of"
        )
    ours, others = (configs.param_shapes(each.config) for each in (checkpoint, original))
    for name in ours | others:
        if ours.get(name) != others.get(name):
            raise CheckpointError(
                f"ORIGINAL_CHECKPOINT_PATH {original.path} is another model than CHECKPOINT_PATH "
                f"{checkpoint.path}: `{name}` is {others.get(name, 'missing')} there, "
                f"{ours.get(name, 'missing')} here; expected the checkpoint that this one was "
                "made of."
            )


def _samples(
    checkpoint: Source, text_options: Text, num_samples: int | None, num_validation_samples: int
) -> dict[str, SampleSet]:
    """The samples of each corpus."""
    config = checkpoint.config
    if num_validation_samples < 1:
        raise ValueError(f"NUM_VALIDATION_SAMPLES is {num_validation_samples}; expected 1 or more")
    if isinstance(text_options.validation_files, Mapping):
        if ALL in text_options.validation_files:
            raise ValueError(
                f"VALIDATION_FILES has a corpus {ALL!r}, as all corpora together are called: "
                "choose another name"
            )
        return text.load_corpora(text_options, config.vocab_size, num_validation_samples)
    held_back = text_options.validation_files is None
    num_calibration = (
        text.num_calibration_samples(config.num_experts, num_samples) if held_back else 0
    )
    samples = text.load(text_options, config.vocab_size, num_calibration, num_validation_samples)
    assert samples.validation is not None
    if held_back and checkpoint.format == "packed":
        _check_held_back(pathlib.Path(checkpoint.path), samples.validation)
    return {ONE_CORPUS: samples.validation}


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


def _introduction(passes: Sequence[_Pass], corpora: Mapping[str, SampleSet]) -> str:
    lines = []
    for each in passes:
        lines.append(f"{each.checkpoint.path} ({each.checkpoint.format})")
        if each.versions != WHOLE:
            lines[-1] += f", {' and '.join(each.versions)}"
    for name, samples in corpora.items():
        targets = int(samples.decoder_offsets[-1])
        lines.append(f"{name}: {len(samples):,} samples, {targets:,} targets")
    return "\n".join(lines)


def _walk(
    passes: Sequence[_Pass],
    samples: Mapping[str, SampleSet],
    dtype: np.dtype,
    compute: Compute,
    console: rich.console.Console,
) -> tuple[dict[str, Corpus], dict[str, float]]:
    """Every corpus through every model; each checkpoint is read once. Also seconds by phase."""
    followed = [
        tuple(
            Track(f"{version}-{place}", version, own)  # names folders: a corpus's might not do
            for version in each.versions
            for place, own in enumerate(samples.values())
        )
        for each in passes
    ]
    total = sum(
        forward.total_work(each.checkpoint, own) for each, own in zip(passes, followed, strict=True)
    )
    losses: dict[str, SampleLosses] = {}
    with progress.showing(total, console) as shown:
        for each, own in zip(passes, followed, strict=True):
            title = f"{' and '.join(each.versions)}, " if len(passes) > 1 else ""
            walk = Walk(each.checkpoint, each.store, own, dtype, compute, title, shown)
            losses |= forward.walk_blocks(walk)
    versions = [version for each in passes for version in each.versions]
    corpora = {
        name: Corpus(own, {version: losses[f"{version}-{place}"] for version in versions})
        for place, (name, own) in enumerate(samples.items())
    }
    return corpora, shown.seconds


def _result(passes: Sequence[_Pass], corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    own = passes[-1]
    paths = {version: each.checkpoint.path for each in passes for version in each.versions}
    recorded = evaluation.record(corpora)
    return {
        "checkpoint": own.checkpoint.path,
        "format": own.checkpoint.format,
        "models": paths,
        **recorded["losses"][own.versions[0]],
        **recorded,
    }
