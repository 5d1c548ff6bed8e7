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
    ident: int = 0  # of the thread: several may have one name


def overlap(spans: Iterable[Span]) -> dict[str, Any]:
    """How long a run took and how long each of its stages was at work, in seconds.

    The device's stage is what the main thread did, which waits for each of its steps, but for
    snapshots; the others have threads of their own. A stage is at work when any of its threads is:
    several devices are one stage. A run can be no faster than its slowest stage. `busy_fraction` is
    the devices' share of the time.
    """
    spans = list(spans)
    if not spans:
        return {}
    wall = max(s.start + s.seconds for s in spans) - min(s.start for s in spans)
    by_stage: dict[str, list[Span]] = {}
    for span in spans:
        own = span.phase == SNAPSHOTS or span.phase.endswith(BESIDE)
        if span.phase != WAITING:
            stage = span.phase.removesuffix(BESIDE) if own else "device"
            by_stage.setdefault(stage, []).append(span)
    stages = {stage: _covered(of) for stage, of in by_stage.items()}
    busy = stages.get("device", 0.0) / max(wall, 1e-9)
    return {"seconds": wall, "stages": stages, "busy_fraction": busy}


def _covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        end = span.start + span.seconds
        total += max(0.0, end - max(span.start, reached))
        reached = max(reached, end)
    return total


def save(spans: Iterable[Span], folder: pathlib.Path) -> None:
    """Writes `timeline.json`.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    spans = list(spans)
    begun = min((span.start for span in spans), default=0.0)
    # Slices of one row must not overlap: each thread has its own.
    found = dict.fromkeys((span.thread, span.ident) for span in spans)
    threads = {thread: tid for tid, thread in enumerate(found, 1)}
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}}
        for (name, _), tid in threads.items()
    ]
    events += [
        {
            "name": span.phase.removesuffix(BESIDE),
            "ph": "X",
            "pid": 1,
            "tid": threads[span.thread, span.ident],
            "ts": round(1e6 * (span.start - begun)),
            "dur": round(1e6 * span.seconds),
        }
        for span in spans
    ]
    array_files.write_text(folder / FILE, json.dumps({"traceEvents": events}) + "\n")
