# SPDX-License-Identifier: Apache-2.0
import importlib.util
import io
import time

import rich.console

from qmoe_jax.runs import progress


def test_lines_where_there_is_no_terminal_and_seconds_by_phase():
    out = io.StringIO()
    with progress.showing(10.0, rich.console.Console(file=out, width=40)) as shown:
        for phase in ("solve", "pack", "solve"):
            with progress.timed(shown, phase):
                time.sleep(0.01)
        progress.advance(shown, 5.0, "encoder block 1 of 2", 1000, 0.5)
        progress.line(shown, "encoder block 1 of 2: 1,000 tokens, a line that must not be wrapped")
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    assert "(50% done, about 0m" in lines[0]
    assert shown.seconds["solve"] >= 0.02 > shown.seconds["pack"] > 0


def test_a_bar_with_rate_and_time_left_on_a_terminal():
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=120)
    with progress.showing(10.0, console) as shown:
        progress.advance(shown, 5.0, "encoder block 1 of 2", 1000, 0.5)
        progress.line(shown, "not shown")
        shown.bar.refresh()
    text = out.getvalue()
    assert "encoder block 1 of 2" in text
    assert "2,000 tokens/s" in text
    assert "ETA" in text
    assert "not shown" not in text


def test_a_notebook_has_a_bar_if_it_has_widgets(monkeypatch):
    notebook = rich.console.Console(file=io.StringIO(), force_jupyter=True)
    assert progress._draws(notebook)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not progress._draws(notebook)
