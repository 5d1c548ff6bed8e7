# SPDX-License-Identifier: Apache-2.0
import io

import numpy as np
import pytest
import rich.console

from qmoe_jax.calibration.walk import SampleLosses
from qmoe_jax.report import LayerRecord, MatrixRecord, Report
from qmoe_jax.runs import progress, records

TARGETS = np.array([10, 20, 30])


def finished(losses):
    layer = LayerRecord("encoder", 0, [1], [1], {}, {"wi": MatrixRecord([0.1], [1], 1, 2, 3)}, 1.0)
    begun = Report({"parameters": 10}, {}, {}, {})
    with progress.showing(1.0, rich.console.Console(file=io.StringIO())) as shown:
        return records.finish(begun, [layer], losses, 100, shown)


def test_the_error_of_a_difference_is_that_between_the_samples_own_differences():
    original = SampleLosses(np.array([10.0, 50.0, 60.0]), TARGETS)
    worse = SampleLosses(original.total + 0.5 * TARGETS, TARGETS)  # as much for every sample
    uneven = SampleLosses(original.total + np.array([3.0, 0.0, 0.0]), TARGETS)
    report = finished({"original": original, "round_to_nearest": uneven, "compressed": worse})
    assert report.losses["compressed"] == pytest.approx(2.5)
    assert report.standard_errors["original"] == pytest.approx(np.sqrt(100 + 100 + 0) / 60)
    assert report.standard_errors["compressed"] == pytest.approx(0, abs=1e-12)
    residual = np.array([3.0, 0.0, 0.0]) - 0.05 * TARGETS
    assert report.standard_errors["round_to_nearest"] == pytest.approx(
        np.linalg.norm(residual) / 60
    )


def test_without_validation_there_are_no_errors():
    assert finished({}).standard_errors == {}
