# SPDX-License-Identifier: Apache-2.0
"""How fast the kernels are on a GPU, beside dense bfloat16 on the same GPU.

    python benchmarks/kernels.py [--implementation=triton]
    python benchmarks/kernels.py --smoke      # small shapes and "xla", to try the script on a CPU

For each published shape, and 1 to 512 tokens over 1, 8 and 128 experts: `packed_matmul` by both of
its paths (where they meet is what `packed_matmul.DENSE_FROM_TOKENS` should say), a batched product
of the same tokens with dense bfloat16 weights, and the time that reading the packed bytes takes at
the measured copy bandwidth, which nothing can go below. Medians, with the span between the
quartiles. Calls rotate among copies of the weights, together larger than the cache.

Then `sub1_decode` against the copy bandwidth (bytes written), the columns of GPTQ for 16 experts of
1024 rows x 4096 columns without the factorization, and the factorization itself, batched against
one expert after another.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import random_experts
import rich.console
import rich.table

from pallas_kernels import gptq_block, implementation, packed_matmul, sub1_decode, testing
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import PackedExperts
from pallas_kernels.testing import Case
from qmoe_jax.codec import packing
from qmoe_jax.quantization import grids

CACHE_BYTES = 128 << 20  # more than the second-level cache of any GPU of today
BATCHES = [(1, 1), (8, 1), (8, 8), (64, 8), (64, 128), (512, 8), (512, 128)]  # tokens, experts
SMOKE = (Case("small wi", 96, 64, (1,)), Case("small wo", 64, 96, (1,)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the GPU kernels")
    parser.add_argument("--smoke", action="store_true", help="small, on any device")
    parser.add_argument("--repeats", type=int, default=30)
    choices = ("auto", "pallas", "triton")
    parser.add_argument("--implementation", choices=choices, default="auto")
    given = parser.parse_args()
    kernel: Implementation = given.implementation
    if implementation.resolve("auto") == "xla":
        if not given.smoke:
            parser.error(
                "this device has no kernels; an NVIDIA GPU of 8.0 or newer has, or --smoke"
            )
        kernel = "xla"
    console = rich.console.Console(width=140)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {given.repeats} repeats")
    cases = SMOKE if given.smoke else testing.PUBLISHED
    cache = 1 << 16 if given.smoke else CACHE_BYTES
    bandwidth = copy_bandwidth(cache, given.repeats)
    console.print(f"copy: {bandwidth / 1e12:.3f} TB/s, bytes read and written")
    for codec in packing.CODECS:
        console.print(f"codec {codec}")
        console.print(matmul_table(cases, codec, cache, bandwidth, given.repeats, kernel))
        console.print(decode_table(cases, codec, cache, bandwidth, given.repeats, kernel))
    console.print(
        gptq_table((2, 32, 64) if given.smoke else (16, 1024, 4096), given.repeats, kernel)
    )


def seconds(run: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], repeats: int):
    """Median and quartile span of a call, over rotating arguments; the first calls compile."""
    for given in arguments:
        jax.block_until_ready(run(*given))
    found = []
    for repeat in range(repeats):
        inner = max(1, 8 // len(arguments)) * len(arguments)
        begun = time.perf_counter()
        for i in range(inner):
            last = run(*arguments[(repeat + i) % len(arguments)])
        jax.block_until_ready(last)
        found.append((time.perf_counter() - begun) / inner)
    low, median, high = statistics.quantiles(found, n=4)
    return median, high - low


def copy_bandwidth(cache: int, repeats: int) -> float:
    """Bytes read plus bytes written a second, of a copy that no cache holds."""
    arrays = [(jnp.full((4 * cache,), i, jnp.uint8),) for i in range(2)]
    median, _ = seconds(jax.jit(lambda array: array + jnp.uint8(1)), arrays, repeats)
    return 2 * 4 * cache / median


def copies(packed: PackedExperts, cache: int) -> list[PackedExperts]:
    """The record, as often as it takes to be larger than the cache."""
    nbytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(packed))
    count = min(64, -(-2 * cache // nbytes))
    return [jax.tree.map(jnp.array, packed) for _ in range(count)]


def matmul_table(cases, codec, cache, bandwidth, repeats, kernel) -> rich.table.Table:
    table = rich.table.Table(
        *("shape", "tokens", "experts", "sub1_matmul µs", "by decoding µs", "dense bfloat16 µs"),
        "times as fast",
        *("floor µs", "Tweights/s"),
    )
    entries = jnp.asarray(packing.entries(codec))
    for case in cases:
        for tokens, experts in BATCHES:
            if case.rows * case.columns * experts > 2e9:
                continue  # dense weights and their copies would not fit
            sizes = np.full(experts, tokens // experts) + (np.arange(experts) < tokens % experts)
            active = int((sizes > 0).sum())
            packed = random_experts.experts((experts, case.rows, case.columns), case.zeros, codec)
            x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, case.columns)))
            x, group_sizes = x.astype(jnp.bfloat16), jnp.asarray(sizes, jnp.int32)
            arguments = [(x, p, entries, group_sizes) for p in copies(packed, cache)]
            run = functools.partial(packed_matmul.packed_matmul, implementation=kernel)
            fused = functools.partial(run, path="fused")
            ours, spread = seconds(jax.jit(fused), arguments, repeats)
            decoding = functools.partial(run, path="dense")
            decoded, decoded_spread = seconds(jax.jit(decoding), arguments, repeats)
            dense, dense_spread = dense_seconds(x, case, active, cache, repeats)
            nbytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(packed))
            floor = nbytes * active / experts / bandwidth
            weights = active * case.rows * case.columns
            table.add_row(
                f"{case.name} {case.rows} x {case.columns}",
                str(tokens),
                str(experts),
                f"{1e6 * ours:.1f} ± {1e6 * spread:.1f}",
                f"{1e6 * decoded:.1f} ± {1e6 * decoded_spread:.1f}",
                f"{1e6 * dense:.1f} ± {1e6 * dense_spread:.1f}",
                f"{dense / min(ours, decoded):.2f}",
                f"{1e6 * floor:.1f}",
                f"{weights / min(ours, decoded) / 1e12:.2f}",
            )
        table.add_section()
    return table


def dense_seconds(x, case: Case, active: int, cache: int, repeats: int):
    """As many tokens for each of the active experts, as one batched product."""
    each = -(-x.shape[0] // active)
    batched = jnp.zeros((active, each, case.columns), jnp.bfloat16) + x[0]
    count = min(16, -(-2 * cache // (2 * active * case.rows * case.columns)))
    shape = (active, case.columns, case.rows)
    weights = [jnp.full(shape, i + 1, jnp.bfloat16) for i in range(count)]
    run = jax.jit(lambda x, w: jnp.einsum("etc,ecr->etr", x, w))
    return seconds(run, [(batched, w) for w in weights], repeats)


def decode_table(cases, codec, cache, bandwidth, repeats, kernel) -> rich.table.Table:
    table = rich.table.Table(
        *("sub1_decode", "experts", "µs", "TB/s written", "of copy bandwidth", "Tweights/s")
    )
    entries = jnp.asarray(packing.entries(codec))
    run = functools.partial(sub1_decode.sub1_decode, dtype=jnp.bfloat16, implementation=kernel)
    for case in cases:
        experts = 8
        packed = random_experts.experts((experts, case.rows, case.columns), case.zeros, codec)
        arguments = [(p, entries, jnp.arange(experts)) for p in copies(packed, cache)[:4]]
        median, spread = seconds(jax.jit(run), arguments, repeats)
        weights = experts * case.rows * case.columns
        table.add_row(
            f"{case.name} {case.rows} x {case.columns}",
            str(experts),
            f"{1e6 * median:.1f} ± {1e6 * spread:.1f}",
            f"{2 * weights / median / 1e12:.2f}",
            f"{2 * weights / median / bandwidth:.0%}",
            f"{weights / median / 1e12:.2f}",
        )
    return table


def gptq_table(shape: tuple[int, int, int], repeats: int, kernel) -> rich.table.Table:
    """All blocks of columns one after another, and Cholesky factorizations."""
    experts, rows, columns = shape
    block = min(128, columns)
    generator = np.random.default_rng(0)
    weights = jnp.asarray(generator.standard_normal((experts, block, rows)), jnp.float32)
    scaled = jnp.asarray(
        np.tril(0.01 * generator.standard_normal((experts, block, block))), jnp.float32
    )
    grid = grids.fit(weights, "ternary", True)[:, :, None]

    @jax.jit
    def columns_of_all_blocks(weights, scaled, grid):
        solve = functools.partial(gptq_block.gptq_block, implementation=kernel)
        return jax.lax.fori_loop(
            0,
            columns // block,
            lambda _, target: solve(target, weights, scaled, grid, "ternary"),
            weights,
        )

    half = jnp.asarray(generator.standard_normal((columns, columns)), jnp.float32)
    hessian = half @ half.T / columns + jnp.eye(columns)
    hessians = jnp.broadcast_to(hessian, (experts, columns, columns))
    table = rich.table.Table(f"{experts} experts, {rows} x {columns}", "ms")
    runs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "columns of all blocks": (columns_of_all_blocks, (weights, scaled, grid)),
        "Cholesky, batched": (jax.jit(jnp.linalg.cholesky), (hessians,)),
        "Cholesky, one by one": (
            jax.jit(lambda h: jax.lax.map(jnp.linalg.cholesky, h)),
            (hessians,),
        ),
    }
    for name, (run, arguments) in runs.items():
        median, spread = seconds(run, [arguments], max(5, repeats // 5))
        table.add_row(name, f"{1e3 * median:.2f} ± {1e3 * spread:.2f}")
    return table


if __name__ == "__main__":
    main()
