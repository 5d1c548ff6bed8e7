# SPDX-License-Identifier: Apache-2.0
"""The run mode `infer`: files in, T5X's files out, nothing lost on the way."""

import io
import json
from typing import Any

import pytest
import rich.console

from qmoe_jax.inference import text_model
from qmoe_jax.runs import infer
from qmoe_jax.runs.infer import Decoding

pytestmark = pytest.mark.usefixtures("quick_compilation")

LINES = [f"Return <extra_id_0> of item {i}." for i in range(7)]
LENGTHS = {"inputs": 40, "targets": 5}


@pytest.fixture
def given(data_dir) -> dict[str, Any]:
    return {
        "checkpoint_path": str(data_dir / "t5x" / "tiny_switch_base" / "legacy"),
        "sentencepiece_model_file": str(data_dir / "text" / "sentencepiece.model"),
        "task_feature_lengths": LENGTHS,
        "batch_size": 2,
        "checkpoint_period": 2,
        "console": rich.console.Console(file=io.StringIO()),
    }


@pytest.fixture
def model(given):
    return text_model.load(
        given["checkpoint_path"], sentencepiece_model_file=given["sentencepiece_model_file"]
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_in_the_order_of_the_prompts(given, model, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    out = tmp_path / "out"
    infer.infer(prompts=str(tmp_path / "a.txt"), infer_output_dir=str(out), **given)
    found = read(out / "a-predict.jsonl-00000-of-00001")
    assert [line["inputs"] for line in found] == [{"inputs_pretokenized": text} for text in LINES]
    assert [line["prediction"] for line in found] == model.generate(LINES, length=5)
    assert "Total number of parameters: 822912" in (out / "model-info.txt").read_text()
    assert len(list(out.iterdir())) == 2


def test_scores_and_aux(given, model, tmp_path):
    records = [{"inputs": text, "targets": f"<extra_id_0> {i}"} for i, text in enumerate(LINES)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    for mode in ("score", "predict_with_aux"):
        infer.infer(
            prompts=[str(tmp_path / "b.jsonl")], infer_output_dir=str(tmp_path), mode=mode, **given
        )
    found = read(tmp_path / "b-score.jsonl-00000-of-00001")
    expected = model.score(LINES, [record["targets"] for record in records])
    assert [line["score"] for line in found] == pytest.approx(expected.tolist(), abs=1e-4)
    assert found[3]["inputs"]["targets_pretokenized"] == "<extra_id_0> 3"
    found = read(tmp_path / "b-predict_with_aux.jsonl-00000-of-00001")
    assert all(line["aux"]["scores"] < 0 and "prediction" in line for line in found)


def test_a_stopped_run_goes_on(given, tmp_path, monkeypatch):
    """Parts that are there are not made again; those of other settings or prompts are."""
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    given |= {"prompts": str(tmp_path / "a.txt"), "infer_output_dir": str(tmp_path / "out")}
    given["decoding"] = Decoding(temperature=1.0)
    answered = infer._answers
    calls = []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answered(*arguments)

    monkeypatch.setattr(infer, "_answers", stops)
    with pytest.raises(KeyboardInterrupt):
        infer.infer(**given)
    assert not (tmp_path / "out" / "a-predict.jsonl-00000-of-00001").exists()
    infer.infer(**given)
    assert len(calls) == 3  # of two parts
    resumed = (tmp_path / "out" / "a-predict.jsonl-00000-of-00001").read_bytes()
    infer.infer(**given | {"infer_output_dir": str(tmp_path / "whole")})
    assert len(calls) == 5
    assert (tmp_path / "whole" / "a-predict.jsonl-00000-of-00001").read_bytes() == resumed


def test_without_a_folder_lines_go_to_standard_output(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one <extra_id_0>\n\ntwo\n"))
    infer.infer(prompts="-", **given)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["inputs"]["inputs_pretokenized"] for line in found] == ["one <extra_id_0>", "two"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "score"}, r"a\.txt has prompts without `targets`"),
        ({"batch_size": 0}, "BATCH_SIZE is 0"),
        ({"task_feature_lengths": {"input": 3}}, "TASK_FEATURE_LENGTHS is"),
        ({"decoding": Decoding(num_decodes=2, temperature=0.5)}, "beams are not drawn"),
        ({"decoding": Decoding(topk=3)}, "set TEMPERATURE"),
        ({"decoding": Decoding(temperature=1.0, topk=3, topp=0.5)}, "give one of them"),
        ({"num_expert_partitions": 0}, "NUM_EXPERT_PARTITIONS is 0; expected 1 to"),
        ({"implementation": "triton"}, "IMPLEMENTATION is 'triton', whose kernels need"),
        ({"sentencepiece_model_file": None}, "holds no sentencepiece.model"),
        ({"checkpoint_path": "/nowhere/checkpoint_1"}, "/nowhere/checkpoint_1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(given, tmp_path, changed, message):
    (tmp_path / "a.txt").write_text("x")
    given |= {"prompts": str(tmp_path / "a.txt"), "infer_output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=message):
        infer.infer(**given | changed)
    with pytest.raises(ValueError, match="files with different names"):
        infer.infer(**given | {"prompts": [str(tmp_path / "a.txt")] * 2})
    assert not (tmp_path / "out").exists()


def test_simulated_experts_give_answers_of_no_meaning(given, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    given |= {"prompts": str(tmp_path / "a.txt"), "infer_output_dir": str(tmp_path)}
    lines = []
    for simulate in (False, True):
        infer.infer(**given, simulate_dense=simulate)
        lines.append((tmp_path / "a-predict.jsonl-00000-of-00001").read_text())
    assert lines[0] != lines[1]
    said = given["console"].file.getvalue()
    assert "a second), compilation included" in said


def test_long_prompts_are_cut_and_counted(given, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 100)
    given |= {"prompts": str(tmp_path / "a.txt"), "dry_run": True}
    infer.infer(**given)
    said = given["console"].file.getvalue()
    assert "1 inputs, 40 tokens, 1 cut to 40" in said
    assert "nothing was written" in said
