# SPDX-License-Identifier: Apache-2.0
"""How fast compression is on this machine, as a share of its own large matmul rate.

    python benchmarks/compress.py --gptq

`--gptq`: GPTQ alone, Cholesky included, at the shapes of Switch-Base's experts, counting
2 x experts x rows x columns^2 operations, against a large float32 matmul of the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.quantization import gptq

SHAPES = [(4, 3072, 768), (2, 768, 3072), (16, 3072, 768)]  # experts, rows, columns


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of compression")
    parser.add_argument("--gptq", action="store_true", help="GPTQ alone")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.gptq:
        benchmark_gptq(arguments.repeats)
    else:
        parser.error("nothing to measure: give --gptq")


def benchmark_gptq(repeats: int) -> None:
    """Alternates matmul and solve, so that both see the same machine."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {repeats} repeats, medians")
    print(f"{'experts x rows x columns':>26} {'matmul':>12} {'GPTQ':>22} {'share':>7}")
    matmul = large_matmul()
    for experts, rows, columns in SHAPES:
        operations = 2.0 * experts * rows * columns**2
        solve = gptq_call(experts, rows, columns)
        times = [(seconds(matmul), seconds(solve)) for _ in range(repeats + 1)][1:]
        rate = 2.0 * 4096**3 / statistics.median(pair[0] for pair in times)
        spent = statistics.median(pair[1] for pair in times)
        achieved = operations / spent
        print(
            f"{f'{experts} x {rows} x {columns}':>26} {rate / 1e9:6.0f} GF/s "
            f"{achieved / 1e9:6.1f} GF/s {spent * 1e3:6.0f} ms {achieved / rate:7.1%}"
        )


def large_matmul() -> Callable[[], jax.Array]:
    """A float32 product of 4096 x 4096 matrices at full precision."""
    a, b = jax.random.normal(jax.random.key(0), (2, 4096, 4096))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    return lambda: product(a, b)


def gptq_call(experts: int, rows: int, columns: int) -> Callable[[], object]:
    """A ternary solve on random weights and the Hessian of correlated tokens."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(experts, columns, rows)), jnp.float32)
    mix = rng.normal(size=(columns, columns)) / np.sqrt(columns)
    X = (rng.normal(size=(2 * columns, columns)) @ mix).astype(np.float32)
    hessian = jnp.broadcast_to(jnp.asarray(X.T @ X), (experts, columns, columns))
    return lambda: gptq.gptq(kernel, hessian, bits="ternary")


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call, its results ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
