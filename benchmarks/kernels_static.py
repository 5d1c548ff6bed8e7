# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels cost by their machine code, on a machine without a GPU.

    python benchmarks/kernels_static.py

Each kernel is compiled for the published shapes (`cuda_compile`). Lane-instructions a weight are 32
times what a warp executes, beginning and end included, over the weights that it decodes; how often
it runs through its loop follows from packs of random trits, 88.5% of them zeros. `issue bound` is
128 lane-instructions a clock and multiprocessor at the given clock: what the kernel would reach if
nothing else held it up. Memory, caches and latency are not in it.
"""

import argparse
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import random_experts
import rich.console
import rich.table

from pallas_kernels import cuda_compile, testing
from pallas_kernels import packed as packed_lib
from pallas_kernels.cuda_compile import CompiledKernel
from pallas_kernels.device import (
    gptq_block_pallas,
    gptq_block_triton,
    sub1_decode_pallas,
    sub1_decode_triton,
    sub1_matmul_pallas,
    sub1_matmul_triton,
)
from pallas_kernels.device.row_shape import RowShape, row_shape
from pallas_kernels.packed import PackedExperts
from pallas_kernels.testing import Case
from pallas_kernels.token_tiles import token_tiles
from qmoe_jax.codec import packing

LANGUAGES = ("pallas", "triton")
EXPERTS = 8
SAMPLED_ROWS = 512  # whose lengths stand for all
LANES = 128  # instructions a clock and multiprocessor
Shape = jax.ShapeDtypeStruct
ZEROS = 0.885


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructions of the GPU kernels")
    parser.add_argument("--capability", type=int, default=90, help="80: A100; 90: H100, H200")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--ghz", type=float, default=1.75)
    given = parser.parse_args()
    a_second = LANES * given.multiprocessors * given.ghz * 1e9
    console = rich.console.Console(width=130)
    console.print(decoding_table(given.capability, a_second))
    console.print(gptq_table(given.capability, a_second))


def decoding_table(capability: int, a_second: float) -> rich.table.Table:
    """`sub1_matmul` with 1 and 8 tokens of each expert, and `sub1_decode`, in bfloat16."""
    table = rich.table.Table(
        *("kernel", "language", "shape", "rows x columns", "codec", "registers", "spills"),
        *("instructions a weight", "issue bound, Tweights/s"),
    )
    for case in testing.PUBLISHED:
        for name, tokens in (("sub1_matmul", 1), ("sub1_matmul", 8), ("sub1_decode", 0)):
            for language in LANGUAGES:
                for codec in packing.CODECS:
                    packed = abstract(case, codec)
                    kernel = compiled(name, language, packed, tokens, capability)
                    shape = row_shape(packed)
                    if (name, language) == ("sub1_matmul", "triton"):
                        shape = sub1_matmul_triton.tile_shape(packed, tokens)
                    cost = lane_instructions(kernel, case, codec, shape) / max(tokens, 1)
                    table.add_row(
                        f"{name}, {tokens} token{'s'[: tokens > 1]}" if tokens else name,
                        language,
                        case.name,
                        f"{case.rows} x {case.columns}",
                        codec,
                        str(kernel.registers),
                        str(kernel.spilled_bytes),
                        f"{cost:.2f}" + (" and token" if tokens > 1 else ""),
                        f"{a_second / cost / 1e12:.1f}",
                    )
        table.add_section()
    return table


def compiled(
    name: str, language: str, packed: PackedExperts, tokens: int, capability: int
) -> CompiledKernel:
    """The kernel for `EXPERTS` experts with as many tokens each."""
    dtype, columns = jnp.dtype(jnp.bfloat16), packed.shape[2]
    entries = Shape(packing.entries(packed.codec).shape, jnp.uint32)
    if name == "sub1_decode":
        experts = Shape((EXPERTS,), jnp.int32)
        if language == "triton":
            launch = sub1_decode_triton.plan(packed, entries, experts, dtype)
            return cuda_compile.compile_launch(launch, capability=capability)

        def decode(packed, entries, experts):
            return sub1_decode_pallas.sub1_decode(packed, entries, experts, dtype)

        arguments = (packed, entries, experts)
        (kernel,) = cuda_compile.compile_kernels(decode, *arguments, capability=capability)
        return kernel

    x, sizes = Shape((EXPERTS * tokens, columns), dtype), Shape((EXPERTS,), jnp.int32)
    if language == "triton":
        tiles = jax.eval_shape(lambda sizes: token_tiles(sizes, EXPERTS * tokens, tokens), sizes)
        launch = sub1_matmul_triton.plan(x, packed, entries, tiles, tokens)
        return cuda_compile.compile_launch(launch, capability=capability)

    def multiply(x, packed, entries, sizes):
        tiles = token_tiles(sizes, EXPERTS * tokens, tokens)
        return sub1_matmul_pallas.sub1_matmul(x, packed, entries, tiles, tokens)

    arguments = (x, packed, entries, sizes)
    (kernel,) = cuda_compile.compile_kernels(multiply, *arguments, capability=capability)
    return kernel


@functools.cache
def sample(case: Case, codec: packing.Codec) -> PackedExperts:
    """Some rows of such an expert, packed."""
    shape = (1, SAMPLED_ROWS, case.columns)
    return random_experts.experts(shape, ZEROS, codec)


def abstract(case: Case, codec: packing.Codec) -> PackedExperts:
    """Shapes of `EXPERTS` such experts, without their data."""
    units = packed_lib.expert_sizes(sample(case, codec))[0] * case.rows / SAMPLED_ROWS
    starts = Shape((EXPERTS, case.rows + 1), jnp.uint32)
    arrays: dict[str, Any] = {
        "codes": Shape((1, EXPERTS * 64 * math.ceil(units / 64)), jnp.uint16),
        "expert_bases": Shape((EXPERTS,), jnp.uint32),
        "row_starts": starts,
        "row_values": Shape((EXPERTS, case.rows, 2), jnp.bfloat16),
    }
    if codec == "tunstall":
        arrays |= {"trees": Shape((EXPERTS,), jnp.uint8), "sign_starts": starts}
    return PackedExperts(**arrays, shape=(EXPERTS, case.rows, case.columns), codec=codec)


def lane_instructions(
    kernel: CompiledKernel, case: Case, codec: packing.Codec, shape: RowShape
) -> float:
    """Executed for each weight."""
    words = np.diff(np.asarray(sample(case, codec).row_starts)[0].astype(np.int64))
    longest = words[: len(words) // shape.rows * shape.rows].reshape(-1, shape.rows).max(1)
    trips = np.ceil(longest / shape.step)
    return float(32 * kernel.executed(float(trips.mean())) / (shape.rows * case.columns))


def gptq_table(capability: int, a_second: float) -> rich.table.Table:
    """`gptq_block` for 16 experts of 1024 rows, and all blocks of 4096 columns."""
    table = rich.table.Table(
        *("kernel", "language", "registers", "spills", "instructions a column"),
        "4096 columns, ms",
    )
    experts, block, rows, columns = 16, 128, 1024, 4096
    shapes = ((experts, block, rows),) * 2 + ((experts, block, block), (2, experts, 1, rows))
    arrays = [Shape(shape, jnp.float32) for shape in shapes]
    for bits in ("ternary", 2):
        solve = functools.partial(gptq_block_pallas.gptq_block, bits=bits)
        (by_pallas,) = cuda_compile.compile_kernels(solve, *arrays, capability=capability)
        launch = gptq_block_triton.plan(*arrays, bits=bits)
        by_triton = cuda_compile.compile_launch(launch, capability=capability)
        for language, kernel in zip(LANGUAGES, (by_pallas, by_triton), strict=True):
            first, last = kernel.loops[-1]
            programs = experts * math.ceil(rows / gptq_block_pallas.ROWS)
            lanes = 32 * kernel.warps * programs * kernel.executed(block) * columns / block
            table.add_row(
                f"gptq_block, {bits}",
                language,
                str(kernel.registers),
                str(kernel.spilled_bytes),
                str(last - first + 1),
                f"{1000 * lanes / a_second:.2f}",
            )
    return table


if __name__ == "__main__":
    main()
