# SPDX-License-Identifier: Apache-2.0
"""How near `plan` comes to the run that it is about, in time and memory.

    python benchmarks/plan_accuracy.py

The run is that of `compress.py --like-published-cpu`: two blocks a stack, 16 experts, random.
Both compile everything anew with JAX_ENABLE_COMPILATION_CACHE=false.
"""

import argparse
import dataclasses
import io
import pathlib
import tempfile
import time

import compress as walk
import numpy as np
import rich.console

from qmoe_jax.checkpoints import source, t5x_writer
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs import compress, devices, plan
from qmoe_jax.runs.groups import Formats


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan against run")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, for the tests")
    smoke = parser.parse_args().smoke
    devices.keep_freed_memory()
    config = dataclasses.replace(walk.PUBLISHED, emb_dim=64, mlp_dim=128, expert_mlp_dim=128)
    config = config if smoke else walk.PUBLISHED
    compare(config, calibration=16 if smoke else walk.CALIBRATION)


def compare(config: SwitchConfig, calibration: int) -> None:
    """Plans, runs, and prints both."""
    float32 = np.dtype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = t5x_writer.save(folder, walk.random_params(config), step=0)
        made = plan.plan(
            str(path),
            num_samples=calibration,
            num_validation_samples=walk.VALIDATION,
            inputs_length=walk.LENGTHS["encoder"],
            console=rich.console.Console(file=io.StringIO()),
        )
        begun = time.perf_counter()
        report = compress.compress_samples(
            source.open_source(path),
            walk.random_samples(calibration, walk.VALIDATION),
            str(pathlib.Path(folder, "packed")),
            quantizer=Quantizer(),
            formats=Formats("qmoe", float32, float32),
            compute=compress.Compute(),
            compare_round_to_nearest=False,
            text_settings={},
            dry_run=False,
            console=rich.console.Console(file=io.StringIO()),
        )
        spent = time.perf_counter() - begun
    estimated = made.seconds["all"]
    print(f"{configs.num_layers(config, 'encoder')} + 2 layers, {config.num_experts} experts")
    print(f"{'':28} {'plan':>9} {'run':>9} {'ratio':>6}")
    print(f"{'all':28} {estimated:7.1f} s {spent:7.1f} s {estimated / spent:6.2f}")
    for phase, seconds in report.seconds.items():
        name = phase.split(",")[0]
        planned = made.seconds.get(name)
        if planned is not None:
            print(f"{name:28} {planned:7.1f} s {seconds:7.1f} s")
    print(f"{'compilation, in the plan':28} {made.seconds['compilation']:7.1f} s")
    peak = report.machine["peak_host_bytes"] / 1e9
    needed = sum(made.needs.host.values()) + max(made.needs.device.values())
    print(f"{'host memory':28} {needed / 1e9:6.2f} GB {peak:6.2f} GB {needed / 1e9 / peak:6.2f}")


if __name__ == "__main__":
    main()
