# SPDX-License-Identifier: Apache-2.0
"""How fast this machine is at each phase: the real loop on a small model of the same widths.

The model has one dense and one sparse block a stack, a few random experts, and samples of the
lengths planned. It runs twice: what the first time takes longer is compilation.
"""

import dataclasses
import io
import pathlib
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import rich.console

from qmoe_jax.calibration import data
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.calibration.text import Samples
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.checkpoints.t5x_experts import ExpertGroup
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import STACKS, Stack, SwitchConfig
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs import compress, machine, tracks, work
from qmoe_jax.runs.compress import Compute
from qmoe_jax.runs.groups import Formats

OPERATIONS = 1.0e12  # of a rehearsal, about: some seconds on a few CPU cores
MAX_EXPERTS, MAX_SAMPLES = 8, 256
READ_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Rates:
    """Units a second by phase; the units are those of `amounts`."""

    by_phase: dict[str, float]
    compile_seconds: float
    read: float | None = None  # bytes a second from the checkpoint


def amounts(
    config: SwitchConfig, calibration: dict[Stack, int], validation: dict[Stack, int], versions: int
) -> dict[str, float]:
    """Work of each phase of a compression, in a unit that its time is about linear in.

    Args:
      config: the model.
      calibration: tokens in each stack.
      validation: the same.
      versions: of the model, that validation samples go through.
    """
    all_tokens: dict[Stack, int] = {s: calibration[s] + versions * validation[s] for s in STACKS}
    phases = ("dense part", "Hessians", "solve", "expert forward", "snapshots")
    found: dict[str, float] = dict.fromkeys(phases, 0.0)
    experts = 0
    for stack in STACKS:
        sparse = configs.sparse_layers(config, stack)
        experts += len(sparse) * config.num_experts
        for layer in range(configs.num_layers(config, stack)):
            found["dense part"] += work.dense_part(config, stack, layer in sparse, all_tokens)
            found["snapshots"] += config.emb_dim * all_tokens[stack]
            if layer in sparse:
                last = (stack, layer) == configs.last_sparse_layer(config)
                passing = all_tokens[stack] - (calibration[stack] if last else 0)
                found["Hessians"] += work.hessians(config, calibration[stack])
                found["expert forward"] += work.forward(config, passing)
    found["solve"] = work.solve(config, experts)
    weights = (
        experts * len(configs.expert_matrices(config)) * config.emb_dim * config.expert_mlp_dim
    )
    found["transfer"] = found["pack"] = float(weights)
    found["losses"] = 2.0 * config.emb_dim * config.vocab_size * versions * validation["decoder"]
    return found


def rehearse(
    config: SwitchConfig,
    lengths: dict[Stack, int],
    *,
    quantizer: Quantizer,
    formats: Formats,
    compute: Compute,
    versions: int,
    operations: float = OPERATIONS,
) -> Rates:
    """Measures the rates of all phases but reading.

    Args:
      config: the model that is planned for.
      lengths: tokens of a sample in each stack.
      quantizer, formats, compute: as of the run planned.
      versions: of the model, that validation samples go through.
      operations: about how much work to do.
    """
    small = _small(config, operations)
    # Each expert gets about as many tokens for its width as in a real run.
    wanted = small.num_experts * 2 * max(config.emb_dim, config.expert_mlp_dim)
    number = int(np.clip(wanted // lengths["encoder"], 4, MAX_SAMPLES))
    vocab = config.vocab_size
    calibration = _samples(lengths, number, vocab)
    validation = _samples(lengths, max(1, number // 8), vocab)
    samples = Samples(vocab, calibration, validation if versions else None)
    times = []
    for _ in range(2):
        parent = compute.buffer_dir and machine.existing(compute.buffer_dir)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            own = dataclasses.replace(
                compute, buffer_dir=compute.buffer_dir and folder, scratch_dir=None
            )
            begun = time.perf_counter()
            report = compress.compress_samples(
                random_source(small),
                samples,
                str(pathlib.Path(folder, "packed")),
                quantizer=quantizer,
                formats=formats,
                compute=own,
                compare_round_to_nearest=versions > 2,
                text_settings={},
                num_devices=1,
                dry_run=False,
                console=rich.console.Console(file=io.StringIO()),
            )
            times.append((time.perf_counter() - begun, report.seconds))
    tokens = tracks.tokens_of(calibration), tracks.tokens_of(validation)
    done = amounts(small, tokens[0], tokens[1], versions)
    seconds = {name.split(",")[0]: spent for name, spent in times[1][1].items()}
    by_phase = {name: done[name] / seconds[name] for name in done if seconds.get(name)}
    return Rates(by_phase, max(0.0, times[0][0] - times[1][0]))


def estimate(
    rates: Rates, wanted: dict[str, float], read_bytes: int, devices: int
) -> dict[str, float]:
    """Seconds by phase; "all" is the run's, in which reading and packing go on beside the rest.

    Args:
      rates: measured on one device.
      wanted: `amounts` of the run.
      read_bytes: of the checkpoint.
      devices: that share the work.
    """
    own = {
        name: wanted[name] / rates.by_phase[name] / (1 if name == "snapshots" else devices)
        for name in wanted
        if name in rates.by_phase
    }
    reading = read_bytes / rates.read if rates.read else 0.0
    packing = own.pop("pack", 0.0)
    main = sum(own.values())
    return own | {
        "compilation": rates.compile_seconds,
        "reading, beside the rest": reading,
        "packing, beside the rest": packing,
        "all": rates.compile_seconds + max(main, reading, packing),
    }


def read_rate(source: Source) -> float | None:
    """Bytes a second of the checkpoint's experts; what the system still has in memory is faster."""
    for stack in STACKS:
        for layer in configs.sparse_layers(source.config, stack):
            begun, nbytes = time.perf_counter(), 0
            # Whole blocks: what is read to be kept would not be counted.
            for group in source.expert_groups(stack, layer, source.chunk_room().experts):
                nbytes += sum(array.nbytes for array in group.arrays.values())
                if nbytes >= READ_BYTES:
                    break
            return nbytes / max(time.perf_counter() - begun, 1e-9)
    return None


def random_source(config: SwitchConfig) -> Source:
    """A checkpoint that is made as it is read: float32, activations of order one."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("scale"):
            return np.ones(shape, np.float32)
        fan_in = 1 if name.endswith("embedding") else shape[-2]
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))

    shapes = configs.param_shapes(config)

    def expert_groups(
        stack: Stack, layer: int, group_size: int, start: int = 0
    ) -> Iterator[ExpertGroup]:
        for first in range(start, config.num_experts, group_size):
            last, arrays = min(first + group_size, config.num_experts), {}
            for name in configs.expert_matrices(config):
                path = f"{stack}/layers_{layer}/mlp/expert/{name}/kernel"
                one = shapes[path][1:]
                arrays[name] = np.stack([draw(f"{path}/{e}", one) for e in range(first, last)])
            yield ExpertGroup(first, last, arrays)

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: draw(name, shapes[name]) for name in names}

    nbytes = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    return Source("random weights", "t5x", config, None, nbytes, read, expert_groups)


def _small(config: SwitchConfig, operations: float) -> SwitchConfig:
    """One dense and one sparse block a stack, and as many experts as the work allows."""
    one = work.solve(config, 1) + work.hessians(config, 2 * config.expert_mlp_dim)
    experts = int(np.clip(operations / (2 * one), 2, min(MAX_EXPERTS, config.num_experts)))
    return dataclasses.replace(
        config,
        num_encoder_layers=2,
        num_decoder_layers=2,
        encoder_sparse_layers=(1,),
        decoder_sparse_layers=(1,),
        num_experts=experts,
    )


def _samples(lengths: dict[Stack, int], number: int, vocab_size: int) -> SampleSet:
    rng = np.random.default_rng(number)
    made = []
    for _ in range(number):
        inputs, targets = (rng.integers(2, vocab_size, lengths[s]).astype(np.int32) for s in STACKS)
        shifted = np.concatenate([[0], targets[:-1]]).astype(np.int32)
        made.append(data.Sample(inputs, shifted, targets))
    return data.stack_samples(made)
