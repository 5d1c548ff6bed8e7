# SPDX-License-Identifier: Apache-2.0
"""What goes into a run's report at its start and at its end."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

import qmoe_jax
from qmoe_jax import report as reports
from qmoe_jax.calibration import data
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.calibration.text import Samples
from qmoe_jax.calibration.walk import SampleLosses
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import STACKS
from qmoe_jax.report import LayerRecord, Report
from qmoe_jax.runs import devices
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.tracks import Track


def begin(original: Source, samples: Samples, settings: dict[str, Any]) -> Report:
    """The record as a run starts: what it was given and where it runs."""
    config = original.config
    checkpoint = {
        "path": original.path,
        "format": original.format,
        "step": original.step,
        "bytes": original.nbytes,
        "parameters": sum(math.prod(shape) for shape in configs.param_shapes(config).values()),
        "sparse_layers": sum(len(configs.sparse_layers(config, stack)) for stack in STACKS),
        "experts": config.num_experts,
    }
    machine = {
        "device": devices.description(),
        "qmoe_jax": qmoe_jax.__version__,
        "jax": jax.__version__,
    }
    sets = {"calibration": samples.calibration, "validation": samples.validation}
    described = {name: _describe(found) for name, found in sets.items() if found is not None}
    return Report(checkpoint, settings, described, machine)


def identity(report: Report, tracks: Iterable[Track], batch_tokens: int) -> dict[str, Any]:
    """What decides every byte of a run's result, by the names that a user knows."""
    checkpoint, settings = report.checkpoint, report.settings
    named = ("codec", "store_dtype", "activation_dtype")
    found = {name.upper(): value for name, value in settings["quantizer"].items()}
    found["LAMBDA"] = found.pop("PENALTY")
    found |= {name.upper(): settings[name] for name in named}
    found["BATCH_TOKENS"] = batch_tokens
    found["CHECKPOINT_PATH"] = ", ".join(
        f"{checkpoint[name]} {name}" for name in ("format", "step", "bytes", "parameters")
    )
    for name, described in report.samples.items():
        found[f"{name} samples (text, vocabulary, lengths, number, SEED)"] = (
            f"{described['samples']} with fingerprint {described['fingerprint'][:16]}"
        )
    found["versions compared"] = [track.name for track in tracks]
    return found


def finish(
    report: Report,
    layers: list[LayerRecord],
    losses: dict[str, SampleLosses],
    packed_bytes: int,
    shown: Progress,
) -> Report:
    """The record at the end of a run."""
    return dataclasses.replace(
        report,
        layers=layers,
        losses={name: found.mean for name, found in losses.items()},
        standard_errors=_standard_errors(losses),
        totals=reports.totals(layers, report.checkpoint["parameters"], packed_bytes),
        seconds=shown.seconds,
        machine=report.machine | {"peak_host_bytes": devices.peak_host_bytes()},
    )


def _standard_errors(losses: dict[str, SampleLosses]) -> dict[str, float]:
    """All saw the same samples: a difference is surer than either of its losses."""
    original = losses.get("original")
    if original is None:
        return {}
    errors = {"original": original.standard_error}
    for name, found in losses.items():
        if name != "original":
            errors[name] = found.minus(original).standard_error
    return errors


def _describe(samples: SampleSet) -> dict[str, Any]:
    return {
        "samples": len(samples),
        "encoder_tokens": len(samples.encoder_input_tokens),
        "decoder_tokens": len(samples.decoder_input_tokens),
        "counts": dataclasses.asdict(samples.counts),
        "fingerprint": data.fingerprint(samples),
    }
