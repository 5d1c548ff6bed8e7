# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the real loop at growing numbers of experts, of reduced width.

    python benchmarks/scale.py

The checkpoint is made from a seed as it is read: no terabytes on disk. One sparse block a stack,
groups of 16 experts, the same samples for every number of experts. Each size is a process of its
own, which first compiles on a small one; seconds by phase and by expert, and the most host memory.
"""

import argparse
import dataclasses
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import rich.console

from qmoe_jax.calibration import data
from qmoe_jax.calibration.text import Samples
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs import compress, devices, rehearsal
from qmoe_jax.runs.groups import Formats

EXPERTS = (16, 64, 256, 1024, 2048)
SAMPLES, INPUTS, TARGETS = 1024, 62, 14
GROUP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Growth with the number of experts")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--one", type=int, help="run one size and print it as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.width)))
        return
    found = []
    for experts in arguments.experts:
        command = [sys.executable, __file__, f"--one={experts}", f"--width={arguments.width}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        show(found[-1], header=len(found) == 1)
    if len(found) > 1:
        growth(found)


def measured(experts: int, width: int) -> dict:
    """The second of two runs in this process."""
    config = SwitchConfig(
        vocab_size=512,
        emb_dim=width,
        num_heads=2,
        head_dim=width // 2,
        mlp_dim=2 * width,
        expert_mlp_dim=2 * width,
        num_encoder_layers=2,
        num_decoder_layers=2,
        encoder_sparse_layers=(1,),
        decoder_sparse_layers=(1,),
        num_experts=experts,
    )
    devices.keep_freed_memory()
    run(dataclasses.replace(config, num_experts=min(GROUP, experts)))
    return {"experts": experts, **run(config)}


def run(config: SwitchConfig) -> dict:
    """One compression."""
    float32, rng = np.dtype(np.float32), np.random.default_rng(0)
    made = []
    for _ in range(SAMPLES):
        inputs, targets = (rng.integers(2, 512, n).astype(np.int32) for n in (INPUTS, TARGETS))
        shifted = np.concatenate([[0], targets[:-1]]).astype(np.int32)
        made.append(data.Sample(inputs, shifted, targets))
    samples = Samples(512, data.stack_samples(made), data.stack_samples(made[:16]))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        report = compress.compress_samples(
            rehearsal.random_source(config),
            samples,
            str(pathlib.Path(folder, "packed")),
            quantizer=Quantizer(),
            formats=Formats("qmoe", float32, float32),
            compute=compress.Compute(experts_per_group=min(GROUP, config.num_experts)),
            compare_round_to_nearest=False,
            text_settings={},
            dry_run=False,
            console=rich.console.Console(file=io.StringIO()),
        )
        spent = time.perf_counter() - begun
    peak = report.machine["peak_host_bytes"]
    return {"seconds": spent, "phases": report.seconds, "peak": peak}


def show(found: dict, header: bool) -> None:
    """One row."""
    phases = {name.split(",")[0]: seconds for name, seconds in found["phases"].items()}
    names = ("dense part", "Hessians", "solve", "expert forward", "transfer", "read", "pack")
    if header:
        print(
            f"{'experts':>8} {'all':>8} {'a expert':>9} "
            + " ".join(f"{n:>14}" for n in names)
            + "    peak"
        )
    each = 1e3 * found["seconds"] / (2 * found["experts"])
    row = " ".join(f"{phases.get(name, 0.0):12.1f} s" for name in names)
    peak = f"{found['peak'] / 1e6:5.0f} MB"
    print(f"{found['experts']:8} {found['seconds']:6.1f} s {each:6.1f} ms {row} {peak}", flush=True)


def growth(found: list[dict]) -> None:
    """A straight line through the times, and how far they are from it."""
    experts = np.asarray([2 * each["experts"] for each in found], float)
    seconds = np.asarray([each["seconds"] for each in found])
    slope, start = np.polyfit(experts, seconds, 1)
    away = np.abs(seconds - (start + slope * experts)) / seconds
    print(f"{1e3 * slope:.2f} ms an expert and {start:.1f} s; off by {away[-1]:.1%} at the largest")
    print(f"host memory, largest over smallest: {found[-1]['peak'] / found[0]['peak']:.2f}")


if __name__ == "__main__":
    main()
