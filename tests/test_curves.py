# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import curves


def curve_of(points: int) -> curves.Curve:
    curve = curves.empty()
    for step in range(10, 10 * points + 1, 10):
        metrics = [{"cross_entropy": step + n, "auxiliary_loss": 1.0} for n in (0.0, 1.0)]
        curves.add(curve, step, metrics, seconds=2, tokens=100)
        if step % 20 == 0:
            curves.add_validation(curve, step, step / 2)
    return curve


def test_points_are_means_and_totals():
    curve = curve_of(3)
    assert curve.series == {
        "steps": [10, 20, 30],
        "cross_entropy": [10.5, 20.5, 30.5],
        "auxiliary_loss": [1.0, 1.0, 1.0],
        "elapsed_seconds": [2, 4, 6],
        "tokens_seen": [100, 200, 300],
    }
    assert curve.validation == {"steps": [20], "loss": [10.0]}


def test_a_curve_is_continued_where_the_state_is(tmp_path):
    curves.save(tmp_path, curve_of(5), {"SEED": 0}, "a device")
    cut = curves.load(tmp_path, 30)
    assert cut == curve_of(3)
    for step in (40, 50):
        metrics = [{"cross_entropy": step + n, "auxiliary_loss": 1.0} for n in (0.0, 1.0)]
        curves.add(cut, step, metrics, seconds=2, tokens=100)
    assert cut.series == curve_of(5).series


def test_the_file_tells_what_was_run(tmp_path):
    curves.save(tmp_path, curve_of(2), {"SEED": 7}, "a device")
    saved = json.loads((tmp_path / "loss_curve.json").read_text())
    assert (saved["seconds"], saved["tokens"], saved["device"]) == (4, 200, "a device")
    assert saved["settings"] == {"SEED": 7}
    assert saved["steps"] == [10, 20]
    assert saved["validation"] == {"steps": [20], "loss": [10.0]}


def test_the_picture_shows_both_curves(tmp_path):
    curves.save(tmp_path, curves.empty(), {}, "")
    empty = (tmp_path / "loss_curve.png").read_bytes()
    curves.save(tmp_path, curve_of(4), {}, "")
    drawn = (tmp_path / "loss_curve.png").read_bytes()
    assert drawn.startswith(b"\x89PNG\r\n") and drawn != empty
    loss, balance = curves.picture(curve_of(4)).axes
    training, validation = loss.get_lines()
    np.testing.assert_array_equal(training.get_xdata(), [10, 20, 30, 40])
    np.testing.assert_array_equal(validation.get_ydata(), [10, 20])
    np.testing.assert_array_equal(balance.get_lines()[0].get_ydata(), [1, 1, 1, 1])


def test_no_file_is_an_empty_curve_and_a_damaged_one_an_error(tmp_path):
    assert curves.load(tmp_path, 9) == curves.empty()
    for text in ("{", "[]", '{"steps": [1]}', '{"loss": [1], "validation": {"steps": []}}'):
        (tmp_path / "loss_curve.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"loss_curve.json is damaged .*: remove it"):
            curves.load(tmp_path, 9)
