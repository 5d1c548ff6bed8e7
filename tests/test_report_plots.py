# SPDX-License-Identifier: Apache-2.0
"""Plots show every value, whatever its size, and stay small."""

import re

import pytest
import report_records
from report_records import SVG

from qmoe_jax.report_page import page as report_page
from qmoe_jax.report_page import plots as report_plots


@pytest.fixture(scope="module")
def small():
    return report_records.synthetic(sparse=2, experts=8)


def test_plots_show_every_value(small):
    found = report_records.plots(report_page.page(small))
    for label, count in (("Zeros of each layer, per cent", 8), ("Time by phase", 0)):
        tree = next(tree for name, tree in found.items() if name.startswith(label))
        assert len(tree.findall(f".//{SVG}circle")) == count
    zeros = found["Zeros of each layer, per cent"]
    titles = [title.text for title in zeros.iter(f"{SVG}title")]
    assert titles[0] == "encoder 1, wi: 86%" and titles[4] == "encoder 1, wo: 89%"
    heights = [float(dot.get("cy")) for dot in zeros.iter(f"{SVG}circle")]
    assert heights[4] < heights[0]  # more zeros stand higher
    cells = found["Calibration tokens of each layer's experts"].iter(f"{SVG}title")
    ordered = sorted(small["layers"][0]["tokens"], reverse=True)
    said = [cell.text.split(": ")[1] for cell in cells][:8]
    assert said == [f"{count:,} tokens" for count in ordered]


def test_runs_of_one_shade_add_up_to_all_experts():
    tokens = [0] * 3 + [1] * 50 + [10] * 40 + [400] * 7
    drawn = report_plots.loads("", [("encoder", 1)], [tokens])
    runs = re.findall(r"encoder 1, (\d+) experts: (\d+) to (\d+) tokens", drawn)
    assert runs == [("7", "400", "400"), ("40", "10", "10"), ("50", "1", "1"), ("3", "0", "0")]


@pytest.mark.parametrize("values", [(0.5,), (0.0,), (1e-9, 3e-9), (16.0, 16.0), (0.1, 1234.5)])
def test_axes_hold_all_values_and_few_ticks(values):
    ticks, digits = report_plots._ticks(min(values), max(values))
    assert ticks[0] <= min(values) and ticks[-1] >= max(values)
    assert 2 <= len(ticks) <= 8
    assert len({f"{tick:.{digits}f}" for tick in ticks}) == len(ticks)
