# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scaling.md: memory and time of the released models on several machines.

    python benchmarks/scaling_tables.py

Memory is the arithmetic of `plan`. Time is operations over published peak rates, times the shares
of `SHARES`, which are assumptions: nothing here was measured on these machines.
"""

import pathlib

import gin
import numpy as np

from qmoe_jax.calibration import span_corruption, text
from qmoe_jax.models.config import STACKS, Stack, SwitchConfig
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import bytes_text
from qmoe_jax.runs import devices, needs, rehearsal
from qmoe_jax.runs.needs import How, Work

MODELS = (
    *(f"switch_base_{experts}" for experts in (8, 16, 32, 64, 128, 256)),
    "switch_large_128",
    "switch_xxl_128",
    "switch_c_2048",
)
# name, devices, bytes of one, bfloat16 and float32 operations a second of one, bytes read a second
MACHINES = (
    ("1 A100-80GB", 1, 80e9, 312e12, 19.5e12, 2e9),
    ("1 H200", 1, 141e9, 989e12, 67e12, 2e9),
    ("8 H100", 8, 80e9, 989e12, 67e12, 8e9),
    ("4 x 8 H100", 32, 80e9, 989e12, 67e12, 32e9),
)
# Of the peak. The last three are float32 at full precision, which tensor cores do not do.
SHARES = {"dense part": 0.4, "expert forward": 0.4, "losses": 0.4, "Hessians": 0.6, "solve": 0.35}
FLOAT32 = ("Hessians", "solve")
INPUTS, VALIDATION, VERSIONS = 512, 128, 2


def main() -> None:
    print("| model | samples | buffers | a group on the device | packed | to be read |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        print(memory_row(name))
    print()
    print(f"| model | operations | {' | '.join(machine[0] for machine in MACHINES)} |")
    print("|---|---|" + "---|" * len(MACHINES))
    for name in MODELS:
        print(time_row(name))


def memory_row(name: str) -> str:
    """Of one A100-80GB."""
    config = model(name)
    samples, work = planned(config)
    how = settings(config, MACHINES[0][1], MACHINES[0][2])
    needed = needs.needs(config, work, how)
    buffers = f"{bytes_text(needed.host['activation buffers'])}"
    if needed.host["activation buffers"] > 400e9:
        buffers += " (BUFFER_DIR)"
    group = f"{how.group_size} experts, {bytes_text(needed.device['experts'])}"
    packed = bytes_text(needed.output["packed experts"] + needed.output["other parameters"])
    return (
        f"| {name.removeprefix('switch_')} | {samples:,} | {buffers} | {group} | {packed} | "
        f"{bytes_text(needed.read)} |"
    )


def time_row(name: str) -> str:
    """Compute and reading go on side by side: the slower one is the time."""
    config = model(name)
    _, work = planned(config)
    amounts = rehearsal.amounts(
        config, dict(work.calibration), dict(work.validation), work.versions
    )
    cells = []
    for _, number, memory, bfloat16, float32, reading in MACHINES:
        spent = sum(
            amounts[phase] / share / (float32 if phase in FLOAT32 else bfloat16)
            for phase, share in SHARES.items()
        )
        read = needs.needs(config, work, settings(config, number, memory)).read / reading
        compute = spent / number
        slower = "reading" if read > compute else "computing"
        cells.append(f"{duration(max(read, compute))} ({slower})")
    total = sum(amounts[phase] for phase in SHARES)
    return f"| {name.removeprefix('switch_')} | {total:.1e} | {' | '.join(cells)} |"


def model(name: str) -> SwitchConfig:
    """A released model's sizes."""
    gin.clear_config()
    gin.add_config_file_search_path(str(pathlib.Path(__file__).parents[1]))
    gin.parse_config_file(f"t5x_configs/models/{name}.gin")
    return gin.query_parameter("%MODEL").scoped_configurable_fn()


def planned(config: SwitchConfig) -> tuple[int, Work]:
    """The paper's samples, all as long as they may be."""
    samples = text.num_calibration_samples(config.num_experts, None)
    each: dict[Stack, int] = {
        "encoder": INPUTS,
        "decoder": span_corruption.span_lengths(INPUTS).targets,
    }
    calibration: dict[Stack, int] = {s: samples * each[s] for s in STACKS}
    validation: dict[Stack, int] = {s: VALIDATION * each[s] for s in STACKS}
    return samples, Work(calibration, validation, VERSIONS)


def settings(config: SwitchConfig, number: int, memory: float) -> How:
    """The defaults on an accelerator, of whose memory JAX takes three quarters."""
    usable = int(memory * 0.75)
    return How(
        quantizer=Quantizer(),
        codec="qmoe",
        activation_bytes=2,
        store_bytes=2,
        source_bytes=np.dtype(np.float32).itemsize,
        group_size=devices.experts_per_group(config, None, number, usable),
        batch_tokens=devices.BATCH_TOKENS,
        num_devices=number,
        mapped=False,
    )


def duration(seconds: float) -> str:
    """In the unit that keeps it short."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
