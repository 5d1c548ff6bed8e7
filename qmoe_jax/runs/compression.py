# SPDX-License-Identifier: Apache-2.0
"""What all steps of one compression share."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from qmoe_jax.calibration.walk import Params
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models.config import Stack
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs.groups import Formats
from qmoe_jax.runs.processes import Processes
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.run_log import Earlier
from qmoe_jax.runs.tracks import Track, Version

VersionParams: TypeAlias = Mapping[Version, Params]


@dataclasses.dataclass(frozen=True)
class Run:
    """A compression at work."""

    original: Source
    output: pathlib.Path
    earlier: Earlier
    quantizer: Quantizer
    formats: Formats
    tracks: tuple[Track, ...]
    keep: Mapping[Stack, np.ndarray | None]  # positions that the Hessians count
    group_size: int  # experts
    halved: list[int]  # group sizes that took its place, each when the device ran out of memory
    devices: list[Any]  # of this process
    processes: Processes
    batch_tokens: int
    buffer_dir: pathlib.Path | None
    shown: Progress
