# SPDX-License-Identifier: Apache-2.0
"""How near `plan` comes to the run that it is about, in time and memory.

    python benchmarks/plan_accuracy.py

The run is that of `compress.py --like-published-cpu`: two blocks a stack, 16 experts, random.
Both compile everything anew with JAX_ENABLE_COMPILATION_CACHE=false.
"""

import argparse
import dataclasses
import io
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import compress as walk
import rich.console

from qmoe_jax.checkpoints import t5x_writer
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.report import Report
from qmoe_jax.runs import devices, plan
from qmoe_jax.runs.plan import Plan

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan against run")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, for the tests")
    smoke = parser.parse_args().smoke
    config = dataclasses.replace(walk.PUBLISHED, emb_dim=64, mlp_dim=128, expert_mlp_dim=128)
    config = config if smoke else walk.PUBLISHED
    compare(config, calibration=16 if smoke else walk.CALIBRATION)


def compare(config: SwitchConfig, calibration: int) -> None:
    """Plans, runs, each in a process of its own, and prints both."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(alone(write, folder, config))
        made = alone(planned, path, calibration)
        spent, report = alone(ran, path, folder, calibration)
    estimated = made.seconds["all"]
    print(f"{configs.num_layers(config, 'encoder')} + 2 layers, {config.num_experts} experts")
    print(f"{'':28} {'plan':>9} {'run':>9} {'ratio':>6}")
    print(f"{'all':28} {estimated:7.1f} s {spent:7.1f} s {estimated / spent:6.2f}")
    for phase, seconds in report.seconds.items():
        name = phase.split(",")[0]
        planned_seconds = made.seconds.get(name)
        if planned_seconds is not None:
            print(f"{name:28} {planned_seconds:7.1f} s {seconds:7.1f} s")
    print(f"{'compilation, in the plan':28} {made.seconds['compilation']:7.1f} s")
    peak = report.machine["peak_host_bytes"] / 1e9
    needed = sum(made.needs.host.values()) + max(made.needs.device.values())
    print(f"{'host memory':28} {needed / 1e9:6.2f} GB {peak:6.2f} GB {needed / 1e9 / peak:6.2f}")


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """In a new process: neither its memory nor its compiled programs are another's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=devices.keep_freed_memory) as pool:
        return pool.submit(function, *arguments).result()


def write(folder: str, config: SwitchConfig) -> pathlib.Path:
    """The checkpoint of both."""
    return t5x_writer.save(folder, walk.random_params(config), step=0)


def planned(path: str, calibration: int) -> Plan:
    """What `plan` finds."""
    return plan.plan(
        path,
        num_samples=calibration,
        num_validation_samples=walk.VALIDATION,
        inputs_length=walk.LENGTHS["encoder"],
        console=rich.console.Console(file=io.StringIO()),
    )


def ran(path: str, folder: str, calibration: int) -> tuple[float, Report]:
    """Seconds of the run, and its report."""
    begun = time.perf_counter()
    console = rich.console.Console(file=io.StringIO())
    report = walk.compress_random(pathlib.Path(path), folder, calibration, console)
    return time.perf_counter() - begun, report


if __name__ == "__main__":
    main()
