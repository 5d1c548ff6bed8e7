# SPDX-License-Identifier: Apache-2.0
"""How much memory and disk a compression needs: arithmetic, from sizes alone.

The formulas are those of docs/compress.md, "Memory and disk". Bytes throughout; "about" where they
depend on the text, the routing or the weights.
"""

import dataclasses
import math
from collections.abc import Mapping

from qmoe_jax.checkpoints.source import Source
from qmoe_jax.checkpoints.t5x_experts import ChunkRoom
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import STACKS, Stack, SwitchConfig
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import bytes_text
from qmoe_jax.runs import devices
from qmoe_jax.runs.machine import Machine

OWN_HOST = 1 << 29  # Python, JAX and its compiler
PAYLOAD = {"qmoe": 0.75, "tunstall": 0.67}  # bits a weight, at 88% zeros
ROW_BITS = {"qmoe": 48, "tunstall": 48, "uniform": 24, "dense": 0}  # lengths, values; scale, zero


@dataclasses.dataclass(frozen=True)
class Work:
    """What goes through the model: tokens of the samples, and versions that the losses compare."""

    calibration: Mapping[Stack, int]
    validation: Mapping[Stack, int]
    versions: int  # that the validation samples go through

    def tokens(self, stack: Stack) -> int:
        """Of all buffers."""
        return self.calibration[stack] + self.versions * self.validation[stack]


@dataclasses.dataclass(frozen=True)
class How:
    """The settings that decide the needs."""

    quantizer: Quantizer
    codec: str
    activation_bytes: int
    store_bytes: int  # of what is not packed
    source_bytes: int  # of a stored weight
    group_size: int  # experts
    batch_tokens: int
    num_devices: int
    mapped: bool  # BUFFER_DIR is set


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes by what takes them; those of one place are there at the same time."""

    device: dict[str, int]  # by phase: they follow each other
    host: dict[str, int]
    output: dict[str, int]  # OUTPUT_DIR
    buffers: int  # BUFFER_DIR
    scratch: int  # SCRATCH_DIR
    read: int  # from the checkpoint


def needs(
    config: SwitchConfig,
    work: Work,
    how: How,
    chunks: ChunkRoom = ChunkRoom(),  # noqa: B008, frozen
) -> Needs:
    """All of them.

    Args:
      config: the model.
      work: the samples.
      how: the settings.
      chunks: what the checkpoint's chunks make it keep.
    """
    weights = expert_weights(config)
    others = sum(math.prod(s) for s in configs.param_shapes(config).values()) - weights
    current = {
        stack: how.activation_bytes * config.emb_dim * work.tokens(stack) for stack in STACKS
    }
    # Both buffers of a stack; in the decoder's walk the encoder's outputs too.
    buffers = max(2 * current["encoder"], current["encoder"] + 2 * current["decoder"])
    host = {
        "activation buffers": 0 if how.mapped else buffers,
        "ids and routes": 30 * max(work.tokens(stack) for stack in STACKS),
        "groups being read": 2 * how.num_devices * how.group_size * expert_bytes(config, how),
        "chunks of the checkpoint": chunks.memory,
        "Python and JAX": OWN_HOST,
    }
    return Needs(
        device=device_needs(config, how),
        host=host,
        output={
            "packed experts": int(weights * bits_per_weight(config, how) / 8),
            "other parameters": how.store_bytes * others,
            "to go on from, until the end": 0 if how.mapped else buffers,
        },
        buffers=2 * sum(current.values()) if how.mapped else 0,
        scratch=chunks.scratch,
        read=how.source_bytes * (weights + others),
    )


def device_needs(config: SwitchConfig, how: How) -> dict[str, int]:
    """Of one device, by phase."""
    D, V = config.emb_dim, config.vocab_size
    widest = max(config.mlp_dim, config.num_heads * config.head_dim)
    outer = 2 * 4 * V * D * (1 if config.logits_via_embedding else 2)
    layer = 2 * 4 * (8 * D * config.num_heads * config.head_dim + 3 * D * widest)
    return {
        "dense part": outer + layer + how.batch_tokens * 4 * (8 * D + 3 * widest),
        "experts": outer + how.group_size * devices.group_bytes(config, how.quantizer.grid),
        "losses": outer + 2 * 4 * how.batch_tokens * V,
    }


def expert_weights(config: SwitchConfig) -> int:
    """Of all experts of all layers."""
    layers = sum(len(configs.sparse_layers(config, stack)) for stack in STACKS)
    return layers * config.num_experts * one_expert(config)


def one_expert(config: SwitchConfig) -> int:
    """Weights."""
    return len(configs.expert_matrices(config)) * config.emb_dim * config.expert_mlp_dim


def stored_bytes(opened: Source) -> int:
    """Of one weight in a checkpoint, on average."""
    parameters = sum(math.prod(s) for s in configs.param_shapes(opened.config).values())
    return max(1, round(opened.nbytes / parameters))


def expert_bytes(config: SwitchConfig, how: How) -> int:
    """Of one expert as the checkpoint stores it."""
    return how.source_bytes * one_expert(config)


def bits_per_weight(config: SwitchConfig, how: How) -> float:
    """Of packed experts, about: at the paper's density of zeros; small models have fewer."""
    if how.codec == "dense":
        return 8.0 * how.store_bytes
    D, F = config.emb_dim, config.expert_mlp_dim
    inputs = len(configs.expert_matrices(config)) - 1
    # Rows are output units: F of each input matrix, D of the other.
    rows = inputs * F + D
    columns = how.quantizer.group_size
    scales = rows if columns is None else rows * max(D, F) // columns
    bits = how.quantizer.bits
    levels = PAYLOAD[how.codec] if bits == "ternary" else float(bits)
    return levels + ROW_BITS[how.codec] * scales / one_expert(config)


def _disks(
    needed: Needs, output: dict[str, int], machine: Machine
) -> list[tuple[str, dict[str, int], int | None, str]]:
    """Of each disk the settings that lie on it, what takes room, what is there, and a remedy."""
    places = {
        "OUTPUT_DIR": (output, machine.output_disk, "OUTPUT_DIR on another disk"),
        "BUFFER_DIR": (
            {"activation buffers": needed.buffers},
            machine.buffer_disk,
            "BUFFER_DIR on another disk, or fewer NUM_SAMPLES",
        ),
        "SCRATCH_DIR": (
            {"blocks of chunks": needed.scratch},
            machine.scratch_disk,
            "SCRATCH_DIR on another disk, or a larger READ_BUDGET",
        ),
    }
    disks: dict[int | str, list[str]] = {}
    for name, (taken, *_) in places.items():
        if sum(taken.values()):
            disks.setdefault(machine.disks.get(name, name), []).append(name)
    found = []
    for names in disks.values():
        taken = {what: size for name in names for what, size in places[name][0].items()}
        there = min((free for name in names if (free := places[name][1]) is not None), default=None)
        remedy = "; or ".join(places[name][2] for name in names)
        found.append((f"disk at {' and '.join(names)}", taken, there, remedy))
    return found


def lacking(needed: Needs, machine: Machine, certain: bool = False) -> list[str]:
    """What does not fit, each with the numbers and a remedy; empty where all does.

    Args:
      needed: see `needs`.
      machine: where the run is to be.
      certain: only what is known exactly: buffers, groups, and half of the packed experts.
    """
    host, output = dict(needed.host), dict(needed.output)
    if certain:
        host = {name: host[name] for name in ("activation buffers", "groups being read")}
        output["packed experts"] //= 2
    elif machine.shared_memory:
        host["as the device's memory"] = max(needed.device.values())
    places = [
        (
            "host memory",
            host,
            machine.host_memory,
            "BUFFER_DIR on a fast disk, or fewer NUM_SAMPLES",
        ),
        *_disks(needed, output, machine),
    ]
    if not certain:
        for phase, nbytes in needed.device.items():
            remedy = "lower EXPERTS_PER_GROUP" if phase == "experts" else "lower BATCH_TOKENS"
            places.append(
                (f"device memory: {phase}", {phase: nbytes}, machine.device_memory, remedy)
            )
    found = []
    for place, taken, there, remedy in places:
        total = sum(taken.values())
        if there is not None and total > there:
            parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in taken.items() if size)
            numbers = f"{bytes_text(total)} needed ({parts}), {bytes_text(there)} there"
            found.append(f"{place}: {numbers}: {remedy}")
    return found
