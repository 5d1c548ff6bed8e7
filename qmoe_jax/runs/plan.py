# SPDX-License-Identifier: Apache-2.0
"""What a compression will take, before anything of it is read: memory, disk, bytes, time."""

import dataclasses
import math
from typing import Any

import rich.console
import rich.table

from qmoe_jax.calibration import span_corruption, text
from qmoe_jax.checkpoints import source
from qmoe_jax.checkpoints.packed_manifest import Codec
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.checkpoints.t5x_experts import ChunkRoom
from qmoe_jax.models import config as configs
from qmoe_jax.models import dtypes
from qmoe_jax.models.config import STACKS, Stack, SwitchConfig
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import bytes_text
from qmoe_jax.runs import devices, groups, machine, needs, rehearsal
from qmoe_jax.runs.compress import Compute
from qmoe_jax.runs.groups import Formats
from qmoe_jax.runs.machine import Machine
from qmoe_jax.runs.needs import How, Needs, Work


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found out."""

    config: SwitchConfig
    machine: Machine
    work: Work
    how: How
    needs: Needs
    lacking: list[str]  # empty: it fits
    seconds: dict[str, float]  # by phase and "all"; empty where nothing was measured


@dataclasses.dataclass(frozen=True)
class Described:
    """A machine that is not the one at hand; what is None is taken from the latter.

    Attributes:
      device_memory: bytes of one accelerator; JAX takes three quarters of it.
      host_memory: bytes.
      disk: free bytes of the one disk that the run writes to.
    """

    device_memory: int | None = None
    host_memory: int | None = None
    disk: int | None = None


def plan(
    checkpoint_path: str | None = None,
    model: SwitchConfig | None = None,
    *,
    output_dir: str | None = None,
    quantizer: Quantizer = Quantizer(),  # noqa: B008, frozen
    compute: Compute = Compute(),  # noqa: B008, frozen
    described: Described = Described(),
    num_samples: int | None = None,
    num_validation_samples: int = 128,
    inputs_length: int = 512,
    compare_round_to_nearest: bool = False,
    codec: Codec | None = None,
    store_dtype: str = "bfloat16",
    num_devices: int | None = None,
    measure: bool = True,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> Plan:
    """Prints what `compress` with the same settings will need, and whether that is there.

    Args:
      checkpoint_path: the checkpoint; None: give `model`.
      model: sizes of a model that is not at hand.
      output_dir: where it would be written; its disk is looked at. None: the working folder's.
      quantizer, compute, num_samples, num_validation_samples, compare_round_to_nearest, codec,
        store_dtype, num_devices: as of `compress`.
      described: another machine; with `device_memory`, `num_devices` are its own.
      inputs_length: tokens of the longest sample; all are taken to be that long.
      measure: run a small model of the same widths for the estimate of time, about a minute.
      dry_run: the same as `measure=False`.
      console: where it goes; None: standard output.

    Raises:
      ValueError: a setting that cannot be, neither checkpoint nor model (or both), a damaged
        checkpoint (CheckpointError).
    """
    console = console or rich.console.Console()
    if (checkpoint_path is None) == (model is None):
        raise ValueError(
            "give either CHECKPOINT_PATH or a model (a model file and --gin.plan.model=%MODEL)"
        )
    opened = None
    if checkpoint_path is not None:
        scratch = machine.existing(compute.scratch_dir or output_dir or ".")
        opened = source.open_source(
            checkpoint_path, memory_budget=compute.read_budget, scratch_dir=scratch
        )
        model = opened.config
    assert model is not None
    formats = Formats(
        codec=groups.check_storable(quantizer, codec),
        store_dtype=dtypes.float_dtype(store_dtype, "STORE_DTYPE"),
        dtype=dtypes.activation_dtype(compute.activation_dtype),
    )
    if num_validation_samples < 0:
        raise ValueError(f"NUM_VALIDATION_SAMPLES is {num_validation_samples}; expected 0 or more")
    here = None if described.device_memory is not None else num_devices
    found = machine.detect(here, output_dir, compute.buffer_dir, compute.scratch_dir)
    found = _machine(found, described, num_devices)
    lengths = span_corruption.span_lengths(inputs_length)
    each: dict[Stack, int] = {"encoder": inputs_length, "decoder": lengths.targets}
    versions = 0 if not num_validation_samples else 3 if compare_round_to_nearest else 2
    calibrated = text.num_calibration_samples(model.num_experts, num_samples)
    samples = {"calibration": calibrated, "validation": num_validation_samples}
    wanted = Work(
        {stack: calibrated * each[stack] for stack in STACKS},
        {stack: num_validation_samples * each[stack] for stack in STACKS},
        versions,
    )
    how, needed, lacking = _fitting(
        model, found, quantizer, compute, formats, wanted, max(each.values()), opened
    )
    seconds: dict[str, float] = {}
    if measure and not dry_run:
        try:
            with console.status("measuring this machine: a small model of the same widths"):
                seconds = _measured(model, each, quantizer, formats, compute, how, wanted, opened)
        except (OSError, ValueError) as error:
            console.print(f"the small model that measures time could not be run: {error}")
    made = Plan(model, found, wanted, how, needed, lacking, seconds)
    console.print(*_pages(made, samples, each), sep="\n")
    return made


def _machine(found: Machine, described: Described, num_devices: int | None) -> Machine:
    for name, size in dataclasses.asdict(described).items():
        if size is not None and size < 1:
            raise ValueError(f"{name.upper()} is {size}; expected bytes, 1 or more")
    changed: dict[str, Any] = {}
    if described.device_memory is not None:
        changed |= {"device": "as described", "device_memory": described.device_memory * 3 // 4}
        if num_devices is not None and num_devices < 1:
            raise ValueError(f"NUM_DEVICES is {num_devices}; expected 1 or more")
        changed |= {"num_devices": num_devices or found.num_devices}
    if described.host_memory is not None:
        changed["host_memory"] = described.host_memory
    if described.disk is not None:
        changed |= dict.fromkeys(("output_disk", "buffer_disk", "scratch_disk"), described.disk)
        changed["disks"] = dict.fromkeys(found.disks, 0)
    return dataclasses.replace(found, **changed)


def _fitting(
    config: SwitchConfig,
    found: Machine,
    quantizer: Quantizer,
    compute: Compute,
    formats: Formats,
    wanted: Work,
    longest: int,
    opened: Source | None,
) -> tuple[How, Needs, list[str]]:
    """The settings that were given, and for the others those that fit best.

    A batch holds at least one sample, of `longest` tokens.
    """
    how = How(
        quantizer=quantizer,
        codec=formats.codec,
        activation_bytes=formats.dtype.itemsize,
        store_bytes=formats.store_dtype.itemsize,
        source_bytes=4 if opened is None else needs.stored_bytes(opened),
        group_size=devices.experts_per_group(
            config,
            compute.experts_per_group,
            found.num_devices,
            found.device_memory,
            quantizer.grid,
        ),
        batch_tokens=devices.batch_tokens(
            compute.batch_tokens, accelerator=not found.shared_memory
        ),
        num_devices=found.num_devices,
        mapped=compute.buffer_dir is not None,
    )
    chunks = ChunkRoom() if opened is None else opened.chunk_room()

    def needed(how: How) -> Needs:
        return needs.needs(config, wanted, how, chunks)

    def too_large(how: How, *phases: str) -> bool:
        there = found.device_memory
        return there is not None and max(needed(how).device[phase] for phase in phases) > there

    while not compute.experts_per_group and how.group_size > 1 and too_large(how, "experts"):
        how = dataclasses.replace(how, group_size=how.group_size // 2)
    while not compute.batch_tokens and how.batch_tokens > longest:
        if not too_large(how, "dense part", "losses"):
            break
        how = dataclasses.replace(how, batch_tokens=max(longest, how.batch_tokens // 2))
    if needs.lacking(needed(how), found) and not how.mapped:
        other = dataclasses.replace(how, mapped=True)
        if not needs.lacking(needed(other), found):
            how = other
    return how, needed(how), needs.lacking(needed(how), found)


def _measured(
    config: SwitchConfig,
    lengths: dict[Stack, int],
    quantizer: Quantizer,
    formats: Formats,
    compute: Compute,
    how: How,
    wanted: Work,
    opened: Source | None,
) -> dict[str, float]:
    rates = rehearsal.rehearse(
        config,
        lengths,
        quantizer=quantizer,
        formats=formats,
        compute=dataclasses.replace(compute, experts_per_group=None),
        versions=wanted.versions,
    )
    # Where blocks are cut anew on disk, the first expert would take as long as all of them.
    if opened is not None and not opened.chunk_room().scratch:
        rates = dataclasses.replace(rates, read=rehearsal.read_rate(opened))
    amounts = rehearsal.amounts(
        config, dict(wanted.calibration), dict(wanted.validation), wanted.versions
    )
    read = how.source_bytes * needs.expert_weights(config)
    return rehearsal.estimate(rates, amounts, read, how.num_devices)


def _pages(made: Plan, samples: dict[str, int], lengths: dict[Stack, int]) -> list[Any]:
    fits = "it fits" if not made.lacking else "IT DOES NOT FIT"
    parameters = sum(math.prod(s) for s in configs.param_shapes(made.config).values())
    head = (
        f"{fits}: {parameters:,} parameters; {samples['calibration']:,} calibration and "
        f"{samples['validation']:,} validation samples of at most {lengths['encoder']} + "
        f"{lengths['decoder']} tokens; {made.machine.num_devices} x {made.machine.device}"
    )
    return [head, *made.lacking, _settings(made), _memory(made), *_time(made)]


def _settings(made: Plan) -> rich.table.Table:
    how = made.how
    table = rich.table.Table("setting", "value", title="Settings")
    table.add_row("EXPERTS_PER_GROUP", str(how.group_size))
    table.add_row("BATCH_TOKENS", f"{how.batch_tokens:,}")
    table.add_row("BUFFER_DIR", "a folder on a fast disk" if how.mapped else "None: in memory")
    table.add_row("CODEC", how.codec)
    return table


def _memory(made: Plan) -> rich.table.Table:
    needed, found = made.needs, made.machine
    table = rich.table.Table("where", "what", "needed", "there", title="Memory and disk")

    def add(where: str, parts: dict[str, int], there: int | None) -> None:
        size = "" if there is None else bytes_text(there)
        for name, nbytes in parts.items():
            table.add_row(where, name, bytes_text(nbytes), size)
            where = size = ""

    device = "a device" if not found.shared_memory else "a device (host memory)"
    add(device, needed.device, found.device_memory)
    add("host memory", needed.host, found.host_memory)
    add("OUTPUT_DIR", needed.output, found.output_disk)
    if needed.buffers:
        add("BUFFER_DIR", {"activation buffers": needed.buffers}, found.buffer_disk)
    if needed.scratch:
        add("SCRATCH_DIR", {"blocks of chunks": needed.scratch}, found.scratch_disk)
    add("checkpoint", {"to be read": needed.read}, None)
    return table


def _time(made: Plan) -> list[Any]:
    if not made.seconds:
        return ["time: not measured (MEASURE)"]
    table = rich.table.Table("phase", "about", title="Time on this machine")
    for phase, spent in made.seconds.items():
        if phase != "all":
            table.add_row(phase, _duration(spent))
    table.add_row("the run", _duration(made.seconds["all"]))
    return [table]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
