# SPDX-License-Identifier: Apache-2.0
"""When each phase of a run was at work, in which thread: how well they overlap.

`timeline.json` is a Chrome trace: it opens in Perfetto (ui.perfetto.dev) and chrome://tracing.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from qmoe_jax.checkpoints import array_files
from qmoe_jax.report import BESIDE

FILE = "timeline.json"
WAITING, SNAPSHOTS = "wait for read", "snapshots"


@dataclasses.dataclass(frozen=True)
class Span:
    """One stretch of one phase."""

    phase: str
    thread: str
    start: float  # seconds on a clock that all spans share
    seconds: float


def overlap(spans: Iterable[Span]) -> dict[str, Any]:
    """How long a run took and how long each of its stages was at work, in seconds.

    The device's stage is what the main thread did, which waits for each of its steps, but for
    snapshots; the others have threads of their own. A run can be no faster than its slowest stage.
    `busy_fraction` is the device's share of the time.
    """
    spans = list(spans)
    if not spans:
        return {}
    wall = max(s.start + s.seconds for s in spans) - min(s.start for s in spans)
    stages: dict[str, float] = {}
    for span in spans:
        own = span.phase == SNAPSHOTS or span.phase.endswith(BESIDE)
        if span.phase != WAITING:
            stage = span.phase.removesuffix(BESIDE) if own else "device"
            stages[stage] = stages.get(stage, 0.0) + span.seconds
    busy = stages.get("device", 0.0) / max(wall, 1e-9)
    return {"seconds": wall, "stages": stages, "busy_fraction": busy}


def save(spans: Iterable[Span], folder: pathlib.Path) -> None:
    """Writes `timeline.json`.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    spans = list(spans)
    begun = min((span.start for span in spans), default=0.0)
    threads = {name: tid for tid, name in enumerate(dict.fromkeys(s.thread for s in spans), 1)}
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}}
        for name, tid in threads.items()
    ]
    events += [
        {
            "name": span.phase.removesuffix(BESIDE),
            "ph": "X",
            "pid": 1,
            "tid": threads[span.thread],
            "ts": round(1e6 * (span.start - begun)),
            "dur": round(1e6 * span.seconds),
        }
        for span in spans
    ]
    array_files.write_text(folder / FILE, json.dumps({"traceEvents": events}) + "\n")
