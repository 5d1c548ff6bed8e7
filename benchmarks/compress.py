# SPDX-License-Identifier: Apache-2.0
"""How fast compression is on this machine, as a share of its own large matmul rate.

    python benchmarks/compress.py --gptq
    python benchmarks/compress.py --like-published-cpu

`--gptq`: GPTQ alone, Cholesky included, at the shapes of Switch-Base's experts, counting
2 x experts x rows x columns^2 operations, against a large float32 matmul of the same run.

`--like-published-cpu`: the whole walk at the size that the published code was measured at: d_model
768, d_ff 3072, 2 + 2 layers of which 1 + 1 are sparse, 16 experts, 256 + 16 samples of 508 tokens,
float32, about 11.3 TFLOP. Weights and tokens are random.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from qmoe_jax.calibration import data
from qmoe_jax.calibration.text import Samples
from qmoe_jax.checkpoints import source, t5x_writer
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import STACKS, Stack, SwitchConfig
from qmoe_jax.quantization import gptq
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import Report
from qmoe_jax.runs import compress, devices, work
from qmoe_jax.runs.groups import Formats

SHAPES = [(4, 3072, 768), (2, 768, 3072), (16, 3072, 768)]  # experts, rows, columns
PUBLISHED_OPERATIONS = 11.3e12
PUBLISHED = SwitchConfig(
    vocab_size=32128,
    emb_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=3072,
    expert_mlp_dim=3072,
    num_encoder_layers=2,
    num_decoder_layers=2,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(1,),
    num_experts=16,
)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # or taken from the cache
CALIBRATION, VALIDATION = 256, 16  # samples
LENGTHS: dict[Stack, int] = {"encoder": 508, "decoder": 113}  # tokens of each


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of compression")
    parser.add_argument("--gptq", action="store_true", help="GPTQ alone")
    parser.add_argument("--like-published-cpu", action="store_true", help="the whole walk")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    devices.keep_freed_memory()  # as the command line does
    devices.keep_compiled_programs()
    if not (arguments.gptq or arguments.like_published_cpu):
        parser.error("nothing to measure: give --gptq or --like-published-cpu")
    if arguments.gptq:
        benchmark_gptq(arguments.repeats)
    if arguments.like_published_cpu:
        benchmark_walk()


def benchmark_walk() -> None:
    """One run; the matmul rate is taken before and after it.

    Compilation is included: of what the machine has not compiled before, or of everything with
    JAX_ENABLE_COMPILATION_CACHE=false.
    """
    matmul = large_matmul()
    rates = [2.0 * 4096**3 / seconds(matmul) for _ in range(4)][1:]
    compiling = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    with tempfile.TemporaryDirectory() as folder:
        path = t5x_writer.save(folder, random_params(PUBLISHED), step=0)
        compiling.clear()
        start = time.perf_counter()
        report = compress_random(path, folder, CALIBRATION, rich.console.Console())
        spent, compiled = time.perf_counter() - start, sum(compiling)
    rates += [2.0 * 4096**3 / seconds(matmul) for _ in range(3)]
    rate = statistics.median(rates)
    ideal = PUBLISHED_OPERATIONS / rate
    print(f"matmul {rate / 1e9:.0f} GF/s: 11.3 TFLOP are {ideal:.1f} s; {spent:.1f} s wall")
    peak = devices.peak_host_bytes() / 1e9
    print(f"{spent / ideal:.2f} times that; {compiled:.1f} s compiling; peak {peak:.2f} GB")
    counted = operations(PUBLISHED)
    print(f"{'phase':24} {'time':>9} {'of all':>7} {'matmul rate':>12}")
    for phase, phase_seconds in sorted(report.seconds.items(), key=lambda item: -item[1]):
        share = f"{counted[phase] / phase_seconds / rate:12.1%}" if phase in counted else ""
        print(f"{phase:24} {phase_seconds:7.1f} s {phase_seconds / spent:7.1%} {share}")


def operations(config: SwitchConfig) -> dict[str, float]:
    """Arithmetic of the walk's phases: matrix products and factorizations alone.

    Calibration goes through the compressed model, up to the last Hessians; validation through the
    original and the compressed one.
    """
    validations = 2 * VALIDATION
    sequences = CALIBRATION + validations
    width = config.num_heads * config.head_dim
    counted = {"dense part": 0.0, "Hessians": 0.0, "expert forward": 0.0}
    for stack in STACKS:
        length = LENGTHS[stack]
        sparse_layers = configs.sparse_layers(config, stack)
        attended = length + (LENGTHS["encoder"] if stack == "decoder" else 0)
        scores = 4.0 * width * length * attended
        for layer in range(configs.num_layers(config, stack)):
            sparse = layer in sparse_layers
            one = work.dense_part(config, stack, sparse, LENGTHS) + scores
            counted["dense part"] += sequences * one
            if sparse:
                last = (stack, layer) == configs.last_sparse_layer(config)
                passing = validations if last else sequences
                counted["Hessians"] += work.hessians(config, CALIBRATION * length)
                counted["expert forward"] += work.forward(config, passing * length)
    sparse_blocks = len(config.encoder_sparse_layers) + len(config.decoder_sparse_layers)
    counted["solve"] = sparse_blocks * work.solve(config, config.num_experts)
    tokens = validations * LENGTHS["decoder"]
    counted["losses"] = 2.0 * config.emb_dim * config.vocab_size * tokens
    return counted


def random_params(config: SwitchConfig) -> dict[str, np.ndarray]:
    """Parameters that keep activations of order one; norms are ones."""
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in configs.param_shapes(config).items():
        if name.endswith("scale"):
            params[name] = np.ones(shape, np.float32)
        else:
            fan_in = 1 if name.endswith("embedding") else shape[-2]
            params[name] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
    return params


def compress_random(
    path: pathlib.Path, folder: str, calibration: int, console: rich.console.Console
) -> Report:
    """Compresses a checkpoint with so many random samples, in float32, into `folder`."""
    float32 = np.dtype(np.float32)
    return compress.compress_samples(
        source.open_source(path),
        random_samples(calibration, VALIDATION),
        str(pathlib.Path(folder, "packed")),
        quantizer=Quantizer(),
        formats=Formats("qmoe", float32, float32),
        compute=compress.Compute(),
        compare_round_to_nearest=False,
        text_settings={},
        dry_run=False,
        console=console,
    )


def random_samples(calibration: int, validation: int) -> Samples:
    """Samples of `LENGTHS` tokens, without sentinels."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(calibration + validation):
        encoder, targets = (rng.integers(2, 32000, n).astype(np.int32) for n in LENGTHS.values())
        inputs = np.concatenate([[0], targets[:-1]]).astype(np.int32)
        made.append(data.Sample(encoder, inputs, targets))
    return Samples(
        32000, data.stack_samples(made[:calibration]), data.stack_samples(made[calibration:])
    )


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
