# SPDX-License-Identifier: Apache-2.0
"""A large model's page holds its worst experts and stays small."""

import re

import numpy as np
from report_records import SVG, Parsed, plots, synthetic

from qmoe_jax.report_page import layers as report_layers
from qmoe_jax.report_page import page as report_page


def test_a_large_model_has_a_small_page():
    record = synthetic()
    page = report_page.page(record)
    assert len(page.encode()) < 500_000
    Parsed(page)
    loads = plots(page)["Calibration tokens of each layer's experts"]
    assert len(loads.findall(f".//{SVG}rect")) <= 8 * 31
    shown = re.findall(r"<summary>encoder 1<.*?</details>", page, re.DOTALL)[0]
    assert shown.count("<tr>") == 1 + report_layers.EXPERT_ROWS
    worst = int(np.argmax([max(pair) for pair in zip(*errors(record["layers"][0]), strict=True)]))
    assert shown.index(f'"row">{worst}<') == shown.index('"row">')  # the first
    assert f"the other {2048 - report_layers.EXPERT_ROWS:,} are in" in shown


def errors(layer):
    return [matrix["error"] for matrix in layer["matrices"].values()]
