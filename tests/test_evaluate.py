# SPDX-License-Identifier: Apache-2.0
import io
import json
from typing import Any

import pytest
import rich.console

from qmoe_jax.calibration.text import Text
from qmoe_jax.runs import compress, evaluate


@pytest.fixture
def text(request):
    demo = request.config.rootpath / "tests" / "data" / "text"
    return Text(
        sentencepiece_model_file=str(demo / "sentencepiece.model"),
        files=str(demo / "calibration.jsonl"),
        task_feature_lengths={"inputs": 64},
        document_mode="split",
    )


def quiet():
    return rich.console.Console(file=io.StringIO())


def test_samples_held_back_are_found_again(text, data_dir, tmp_path):
    """Compression takes them from the end of its own text; evaluation repeats the draw."""
    path = str(data_dir / "t5x" / "tiny_switch_base" / "legacy")
    numbers: dict[str, Any] = {"num_samples": 8, "num_validation_samples": 4}
    report = compress.compress(path, str(tmp_path / "out"), text, console=quiet(), **numbers)
    result = evaluate.evaluate(str(tmp_path / "out"), text, console=quiet(), **numbers)
    assert result["loss"] == report.losses["compressed"]
    assert result["fingerprint"] == report.samples["validation"]["fingerprint"]
    others: tuple[dict[str, Any], ...] = ({"num_samples": 6}, {"num_validation_samples": 3})
    for other in others:
        with pytest.raises(ValueError, match="not the samples that the compression"):
            evaluate.evaluate(str(tmp_path / "out"), text, console=quiet(), **(numbers | other))
    with pytest.raises(ValueError, match="choose another folder"):
        evaluate.evaluate(path, text, eval_output_dir=str(tmp_path / "out"), console=quiet())


def test_the_result_is_saved(text, data_dir, tmp_path):
    path = str(data_dir / "t5x" / "tiny_switch_base" / "legacy")
    options = {"num_samples": 1, "num_validation_samples": 3, "console": quiet()}
    result = evaluate.evaluate(path, text, eval_output_dir=str(tmp_path / "eval"), **options)
    saved = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert saved["loss"] == result["loss"]
    assert saved["samples"] == 3
    assert 0 < saved["standard_error"] < saved["loss"]


def test_dry_run_and_too_few_samples(text, data_dir, tmp_path):
    path = str(data_dir / "t5x" / "tiny_switch_base" / "legacy")
    folder = str(tmp_path / "eval")
    options = {"num_samples": 1, "eval_output_dir": folder, "console": quiet()}
    assert evaluate.evaluate(path, text, dry_run=True, **options) == {}
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="NUM_VALIDATION_SAMPLES is 0"):
        evaluate.evaluate(path, text, num_validation_samples=0, **options)
