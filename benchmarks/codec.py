# SPDX-License-Identifier: Apache-2.0
"""What the two codecs of ternary experts take, and how fast they are packed and unpacked.

    python benchmarks/codec.py [--checkpoint=packed] [--speed]

Rates are of independent trits: payload (the codes alone) at rows of 4,096, and all that is stored
at the shapes and densities of the published models. With `--checkpoint` also those of a ternary
packed checkpoint, whose experts are packed anew in both codecs; its entropy is that of a matrix's
levels in all layers, as if its rows were alike. `--speed` times packing and unpacking here.
"""

import argparse
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import random_experts
import rich.console
import rich.table
import scaling_tables

from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import packed
from qmoe_jax.codec import packing, rates
from qmoe_jax.models import config as configs

ZEROS = (0.85, 0.885, 0.90, 0.92, 0.95)
# Entropies of the published packs, in bits an expert weight (arXiv 2310.16795).
PUBLISHED = {"switch_base_128": 0.735, "switch_large_128": 0.710, "switch_c_2048": 0.626}
BFLOAT16_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Rate:
    """Bits a weight."""

    payload: float
    total: float
    entropy: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates and speed of the ternary codecs")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a ternary packed checkpoint")
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    console = rich.console.Console(width=110)
    console.print(payload_table())
    console.print(models_table())
    if given.checkpoint:
        console.print(checkpoint_table(given.checkpoint))
    if given.speed:
        console.print(speed_table())


def payload_table() -> rich.table.Table:
    table = rich.table.Table(
        "zeros", "entropy", *(f"{c}: payload / entropy" for c in packing.CODECS)
    )
    for zeros in ZEROS:
        trits = random_experts.trits((4, 256, 4096), zeros)
        found = [rate(trits, codec) for codec in packing.CODECS]
        shares = (f"{of.payload:.4f} / {of.payload / of.entropy:.3f}" for of in found)
        table.add_row(f"{zeros:.1%}", f"{found[0].entropy:.4f}", *shares)
    return table


def models_table() -> rich.table.Table:
    """All that is stored of the experts of a model, and the model as a whole."""
    table = rich.table.Table("model", "entropy", "codec", "bits a weight", "/ entropy", "whole, GB")
    for name, entropy in PUBLISHED.items():
        config = scaling_tables.model(name)
        zeros = density(entropy)
        shapes = {
            matrix: (config.emb_dim, config.expert_mlp_dim)[:: 1 if matrix == "wo" else -1]
            for matrix in configs.expert_matrices(config)
        }
        sizes = {path: math.prod(shape) for path, shape in configs.param_shapes(config).items()}
        experts = sum(size for path, size in sizes.items() if "/mlp/expert/" in path)
        others = BFLOAT16_BYTES * (sum(sizes.values()) - experts)
        for codec in packing.CODECS:
            found = [
                rate(random_experts.trits((1, *shape), zeros), codec) for shape in shapes.values()
            ]
            bits = statistics.mean(of.total for of in found)  # of matrices of one size
            least = statistics.mean(of.entropy for of in found)
            whole = (experts * bits / 8 + others) / 1e9
            table.add_row(
                *(name, f"{entropy:.3f}", codec),
                *(f"{bits:.4f}", f"{bits / least:.3f}", f"{whole:.2f}"),
            )
    return table


def checkpoint_table(path: pathlib.Path) -> rich.table.Table:
    """The same of a packed checkpoint's own experts."""
    table = rich.table.Table(
        *("matrix", "zeros", "entropy", "codec", "payload", "/ entropy", "total", "/ entropy")
    )
    for name, groups in _matrices(packed.open_checkpoint(path)):
        trits = [np.asarray(packing.unpack_ternary(group)) for group in groups]
        counts = np.sum([np.bincount(part.reshape(-1), minlength=3) for part in trits], axis=0)
        least = rates.entropy(counts)
        for codec in packing.CODECS:
            stored = [
                rates.bits_per_weight(packing.pack_ternary(part, group.row_values, codec))
                for part, group in zip(trits, groups, strict=True)
            ]
            weights = sum(of.weights for of in stored)
            payload = sum(of.codes for of in stored) / weights
            total = sum(of.total * of.weights for of in stored) / weights
            table.add_row(
                *(name, f"{counts[0] / counts.sum():.1%}", f"{least:.4f}", codec),
                *(f"{payload:.4f}", f"{payload / least:.3f}"),
                *(f"{total:.4f}", f"{total / least:.3f}"),
            )
    return table


def speed_table(repeats: int = 7) -> rich.table.Table:
    """One codec after the other, again and again; medians."""
    table = rich.table.Table("experts x rows x columns", "codec", "pack, ns a weight", "unpack")
    for shape in ((16, 3072, 768), (16, 768, 3072)):
        trits = jnp.asarray(random_experts.trits(shape, 0.885))
        values = _values(shape)
        times = {codec: [] for codec in packing.CODECS}
        for _ in range(repeats + 1):
            for codec, taken in times.items():
                begun = time.perf_counter()
                record = jax.block_until_ready(packing.pack_ternary(trits, values, codec))
                packed_at = time.perf_counter()
                jax.block_until_ready(packing.unpack_ternary(record))
                taken.append((packed_at - begun, time.perf_counter() - packed_at))
        for codec, taken in times.items():  # the first time compiles
            medians = np.median(taken[1:], axis=0) / trits.size * 1e9
            name = " x ".join(map(str, shape))
            table.add_row(name, codec, *(f"{of:.2f}" for of in medians))
    return table


def rate(trits: np.ndarray, codec: packing.Codec) -> Rate:
    stored = rates.bits_per_weight(packing.pack_ternary(trits, _values(trits.shape), codec))
    entropy = rates.entropy(np.bincount(trits.reshape(-1), minlength=3))
    return Rate(stored.payload, stored.total, entropy)


def density(entropy: float) -> float:
    """The share of zeros at which independent trits have this entropy; by bisection."""
    low, high = 1 / 3, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        signs = (1 - middle) / 2
        if rates.entropy([middle, signs, signs]) > entropy:
            low = middle
        else:
            high = middle
    return low


def _values(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.array([-0.5, 0.75], np.float32), (*shape[:2], 2))


def _matrices(store: packed.PackedCheckpoint) -> Iterator[tuple[str, list[PackedExperts]]]:
    """Of each matrix its groups over all layers: what has one shape."""
    found: dict[str, list[PackedExperts]] = {}
    for stack, layer in store.groups:
        for _, experts in packed.read_groups(store, stack, layer):  # pyright: ignore
            for matrix, record in experts.items():
                assert isinstance(record, PackedExperts)
                found.setdefault(matrix, []).append(record)
    yield from found.items()


if __name__ == "__main__":
    main()
