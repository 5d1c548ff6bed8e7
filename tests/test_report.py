# SPDX-License-Identifier: Apache-2.0
import io
import json

import numpy as np
import pytest
import rich.console

from qmoe_jax import report as reports
from qmoe_jax.report import LayerRecord, MatrixRecord, Report


def matrix(counts, weights, bits):
    return MatrixRecord([0.1, None], counts, counts[0], weights, bits)


@pytest.fixture
def layers():
    first = {"wi": matrix([800, 100, 100], 1000, 900), "wo": matrix([900, 50, 50], 1000, 700)}
    second = {"wi": matrix([1000, 0, 0], 1000, 600), "wo": matrix([700, 150, 150], 1000, 1000)}
    starved = {"1": "no calibration tokens"}
    return [
        LayerRecord("encoder", 1, [10, 0], [8, 0], starved, first, 1.0),
        LayerRecord("decoder", 1, [5, 5], [4, 4], {}, second, 2.0),
    ]


def test_totals_by_hand(layers):
    found = reports.totals(layers, parameters=10_000, packed_bytes=2500)
    assert found["expert_weights"] == 4000
    assert found["zero_fraction"] == 3400 / 4000
    assert found["bits_per_expert_weight"] == 3200 / 4000
    shares = np.array([3400, 300, 300]) / 4000
    assert found["entropy_per_expert_weight"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found["expert_compression"] == 16 * 4000 / 3200
    assert found["compression"] == 20_000 / 2500
    assert found["bits_per_parameter"] == 2.0


def test_what_is_not_finite_is_null_in_json():
    text = reports.to_json({"losses": {"original": float("nan"), "compressed": 1.5}, "n": (1, 2)})
    assert json.loads(text) == {"losses": {"original": None, "compressed": 1.5}, "n": [1, 2]}


def test_summary_shows_losses_sizes_and_every_fallback(layers):
    report = Report(
        checkpoint={},
        settings={},
        samples={},
        machine={},
        layers=layers,
        losses={"original": 2.0, "round_to_nearest": 2.5, "compressed": 2.125},
        standard_errors={"original": 0.25, "round_to_nearest": 0.0625, "compressed": 0.03125},
        totals=reports.totals(layers, 10_000, 2500),
        seconds={"solve": 3.0, "read": 1.0},
    )
    out = io.StringIO()
    rich.console.Console(file=out, width=100).print(reports.summary(report))
    text = out.getvalue()
    for expected in ("round to nearest", "20.00x", "8.00x", "85.0%", "75%"):
        assert expected in text
    for expected in ("2.0000 ± 0.2500", "2.1250", "+0.1250 ± 0.0312", "+0.5000 ± 0.0625"):
        assert expected in text
    assert "encoder/layers_1 expert 1: no calibration tokens" in text
