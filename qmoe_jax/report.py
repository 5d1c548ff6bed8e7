# SPDX-License-Identifier: Apache-2.0
"""The record of one compression: what it did, what it cost in loss, what it saved in bits."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.console
import rich.table

from qmoe_jax.checkpoints import array_files
from qmoe_jax.codec import rates

BESIDE = ", beside the rest"  # ends the names of phases that have a thread of their own


@dataclasses.dataclass(frozen=True)
class MatrixRecord:
    """One matrix of all experts of a layer."""

    error: list[float | None]  # of each expert, relative; None where nothing measures it
    level_counts: list[int]  # zero, min, max of ternary; else one count for each level
    zeros: int
    weights: int
    bits: int  # stored: codes and what belongs to them

    @property
    def zero_fraction(self) -> float:
        return self.zeros / self.weights

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.weights


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """One sparse layer."""

    stack: str
    layer: int
    tokens: list[int]  # calibration tokens routed to each expert
    hessian_tokens: list[int]  # of those, counted in its Hessians
    fallbacks: dict[str, str]  # expert -> why it (or a matrix of it) was rounded to nearest
    matrices: dict[str, MatrixRecord]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a run can tell afterwards; JSON values throughout."""

    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    samples: dict[str, Any]
    machine: dict[str, Any]
    layers: list[LayerRecord] = dataclasses.field(default_factory=list)
    losses: dict[str, float] = dataclasses.field(default_factory=dict)  # nats per target token
    # Of the original's loss; of the others, of the difference from it.
    standard_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    totals: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def totals(layers: list[LayerRecord], parameters: int, packed_bytes: int) -> dict[str, Any]:
    """Rates over the whole model. Bits count everything stored; sizes in bytes of arrays.

    `bfloat16_bytes` is the model in bfloat16, which the paper's rates compare with.
    """
    matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
    weights = sum(matrix.weights for matrix in matrices)
    bits = sum(matrix.bits for matrix in matrices)
    counts = np.sum([matrix.level_counts for matrix in matrices], axis=0)
    return {
        "parameters": parameters,
        "expert_weights": weights,
        "zero_fraction": sum(matrix.zeros for matrix in matrices) / weights,
        "bits_per_expert_weight": bits / weights,
        "entropy_per_expert_weight": rates.entropy(counts),
        "bits_per_parameter": 8 * packed_bytes / parameters,
        "expert_bytes": bits // 8,
        "packed_bytes": packed_bytes,
        "bfloat16_bytes": 2 * parameters,
        "expert_compression": 16 * weights / bits,
        "compression": 2 * parameters / packed_bytes,
    }


def save(report: Report, path: pathlib.Path) -> None:
    """Writes the report as JSON.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    array_files.write_text(path, to_json(dataclasses.asdict(report)))


def to_json(record: Any) -> str:
    """JSON text; what is not finite becomes null, which JSON has, and not NaN, which it has not."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=1, allow_nan=False) + "\n"


def introduction(report: Report) -> str:
    """What is about to be done, in a few lines."""
    source, samples, settings = report.checkpoint, report.samples, report.settings
    quantizer = settings["quantizer"]
    lines = [
        f"{source['path']} ({source['format']}, step {source['step']}): "
        f"{source['parameters']:,} parameters, {source['sparse_layers']} sparse layers of "
        f"{source['experts']} experts, {bytes_text(source['bytes'])}",
        f"{quantizer['method']}, {quantizer['bits']} bits"
        if quantizer["bits"] != "ternary"
        else f"{quantizer['method']}, ternary",
    ]
    for name in ("calibration", "validation"):
        if samples.get(name):
            found = samples[name]
            lines.append(
                f"{name}: {found['samples']:,} samples, {found['encoder_tokens']:,} + "
                f"{found['decoder_tokens']:,} tokens" + _skipped(found["counts"])
            )
    return "\n".join(lines)


def summary(report: Report) -> rich.console.Group:
    """The tables at the end of a run."""
    return rich.console.Group(
        _losses_table(report), _sizes_table(report), _time_table(report), *_warnings(report)
    )


def _losses_table(report: Report) -> rich.table.Table:
    table = rich.table.Table("", "loss", "difference", title="Masked-span loss (nats per token)")
    original = report.losses.get("original")
    for name, loss in report.losses.items():
        error = f" ± {report.standard_errors[name]:.4f}" if name in report.standard_errors else ""
        if name == "original":
            table.add_row(name, f"{loss:.4f}{error}", "")
        else:
            change = "" if original is None else f"{loss - original:+.4f}{error}"
            table.add_row(name.replace("_", " "), f"{loss:.4f}", change)
    return table


def _sizes_table(report: Report) -> rich.table.Table:
    found = report.totals
    table = rich.table.Table("", "experts", "whole model", title="Size")
    table.add_row(
        "bfloat16", bytes_text(2 * found["expert_weights"]), bytes_text(found["bfloat16_bytes"])
    )
    table.add_row(
        "compressed", bytes_text(found["expert_bytes"]), bytes_text(found["packed_bytes"])
    )
    table.add_row("rate", f"{found['expert_compression']:.2f}x", f"{found['compression']:.2f}x")
    table.add_row(
        "bits per weight",
        f"{found['bits_per_expert_weight']:.3f} (entropy {found['entropy_per_expert_weight']:.3f})",
        f"{found['bits_per_parameter']:.3f}",
    )
    table.add_row("zeros", f"{found['zero_fraction']:.1%}", "")
    return table


def _time_table(report: Report) -> rich.table.Table:
    table = rich.table.Table("phase", "seconds", "share", title="Time")
    total = main_seconds(report.seconds)
    for phase, seconds in sorted(report.seconds.items(), key=lambda item: -item[1]):
        table.add_row(phase, f"{seconds:.1f}", f"{seconds / max(total, 1e-9):.0%}")
    if overlap := report.machine.get("overlap"):
        busy = f"{overlap['busy_fraction']:.0%} of {overlap['seconds']:,.1f} s"
        table.caption = f"the device was busy for {busy}"
    return table


def main_seconds(seconds: Mapping[str, float]) -> float:
    """Of all phases that do not go on beside others."""
    return sum(spent for phase, spent in seconds.items() if not phase.endswith(BESIDE))


def _warnings(report: Report) -> list[str]:
    fallen = [
        f"{layer.stack}/layers_{layer.layer} expert {expert}: {why}"
        for layer in report.layers
        for expert, why in layer.fallbacks.items()
    ]
    if not fallen:
        return []
    shown = "\n".join(f"  {item}" for item in fallen[:10])
    more = f"\n  and {len(fallen) - 10} more in report.json" if len(fallen) > 10 else ""
    experts = "1 expert was" if len(fallen) == 1 else f"{len(fallen)} experts were"
    return [f"{experts} rounded to nearest:\n{shown}{more}"]


def _skipped(counts: dict[str, int]) -> str:
    if not counts.get("documents_read"):
        return ""
    return (
        f" (of {counts['documents_read']:,} documents {counts['too_long']:,} were too long, "
        f"{counts['too_short']:,} too short)"
    )


def bytes_text(number: int | float) -> str:
    """A size in the unit that keeps it short, three orders of magnitude apart."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.2f} {unit}"
