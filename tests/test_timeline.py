# SPDX-License-Identifier: Apache-2.0
"""Spans of a run as a Chrome trace, and how well its stages overlap."""

import json

import pytest

from qmoe_jax.report import BESIDE
from qmoe_jax.runs import timeline
from qmoe_jax.runs.timeline import Span

SPANS = [
    Span(f"read{BESIDE}", "reader", 100.0, 2.0),
    Span("wait for read", "main", 100.0, 2.0),
    Span(f"read{BESIDE}", "reader", 102.0, 2.0),
    Span("solve", "main", 102.0, 3.0),
    Span("expert forward", "main", 105.0, 1.0),
    Span("snapshots", "main", 106.0, 0.5),
    Span(f"pack{BESIDE}", "writer", 105.0, 3.0),
]


def test_overlap_of_stages():
    found = timeline.overlap(SPANS)
    assert found["seconds"] == pytest.approx(8.0)
    assert found["stages"] == pytest.approx(
        {"read": 4.0, "device": 4.0, "pack": 3.0, "snapshots": 0.5}
    )
    assert found["busy_fraction"] == pytest.approx(0.5)
    assert timeline.overlap([]) == {}


def test_several_devices_at_once_are_busy_once():
    """Their threads have one name."""
    spans = [Span("solve", "device", 0.0, 2.0, ident) for ident in range(4)]
    spans += [Span("dense part", "main", 3.0, 1.0), Span("solve", "device", 1.0, 2.0, 9)]
    assert timeline.overlap(spans)["busy_fraction"] == pytest.approx(1.0)
    assert timeline.overlap([*spans, Span("solve", "device", 5.0, 1.0)])[
        "busy_fraction"
    ] == pytest.approx(5 / 6)


def test_threads_of_one_name_have_rows_of_their_own(tmp_path):
    timeline.save([Span("solve", "device", 0.0, 2.0, ident) for ident in range(3)], tmp_path)
    events = json.loads((tmp_path / timeline.FILE).read_text())["traceEvents"]
    assert len({e["tid"] for e in events if e["ph"] == "X"}) == 3
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == 3 * ["device"]


def test_the_trace_holds_every_span_in_its_thread(tmp_path):
    timeline.save(SPANS, tmp_path)
    events = json.loads((tmp_path / timeline.FILE).read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    found = [(e["name"], names[e["tid"]], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert found[0] == ("read", "reader", 0, 2_000_000)
    assert found[-1] == ("pack", "writer", 5_000_000, 3_000_000)
    assert len(found) == len(SPANS)
