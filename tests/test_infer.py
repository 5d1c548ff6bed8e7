# SPDX-License-Identifier: Apache-2.0
"""The run mode `infer`: files in, T5X's files out, nothing lost on the way."""

import io
import json
import pathlib
from typing import Any

import pytest
import rich.console

from qmoe_jax.inference import text_model
from qmoe_jax.runs import answer_files, infer
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


def counted(monkeypatch, stop_at=None):
    """The prompts of each part that is answered; before number `stop_at` the run is stopped."""
    answered, calls = answer_files._answers, []

    def counting(model, columns, *rest):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(len(columns[0]))
        return answered(model, columns, *rest)

    monkeypatch.setattr(answer_files, "_answers", counting)
    return calls


def stopped(given, monkeypatch, after):
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        counted(context, stop_at=after)
        infer.infer(**given)


@pytest.fixture
def two_files(given, tmp_path):
    """A part and a half of each; tokens are drawn."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {line}" for line in LINES[:6]))
    files = [str(tmp_path / f"{name}.txt") for name in "ab"]
    out = {"infer_output_dir": str(tmp_path / "out"), "decoding": Decoding(temperature=1.0)}
    return given | out | {"prompts": files}


def test_a_stopped_run_goes_on(two_files, tmp_path, monkeypatch):
    """No part is made again, in whichever file it was stopped; the files are as in one go."""
    stopped(two_files, monkeypatch, after=3)
    assert not list((tmp_path / "out").glob("*.jsonl-00000-of-00001"))
    calls = counted(monkeypatch)
    infer.infer(**two_files)
    assert calls == [2]
    infer.infer(**two_files | {"infer_output_dir": str(tmp_path / "whole")})
    names = ["a-predict.jsonl-00000-of-00001", "b-predict.jsonl-00000-of-00001", "model-info.txt"]
    for folder in ("out", "whole"):
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"decoding": Decoding(temperature=0.5)},
        {"task_feature_lengths": {"inputs": 40, "targets": 4}},
        {"batch_size": 4, "checkpoint_period": 1},
        {"sentencepiece_model_file": "another"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_parts_of_other_settings_are_not_taken(changed, two_files, tmp_path, monkeypatch):
    stopped(two_files, monkeypatch, after=1)
    if "sentencepiece_model_file" in changed:  # the same pieces, but for one
        model = pathlib.Path(two_files["sentencepiece_model_file"]).read_bytes()
        (tmp_path / "other.model").write_bytes(model.replace(b"return", b"nruter"))
        changed = {"sentencepiece_model_file": str(tmp_path / "other.model")}
    calls = counted(monkeypatch)
    infer.infer(**two_files | changed)
    assert calls == [4, 2, 4, 2]


def test_parts_of_other_prompts_are_not_taken(two_files, tmp_path, monkeypatch):
    stopped(two_files, monkeypatch, after=3)
    (tmp_path / "a.txt").write_text("\n".join([*LINES[:4], "a last one"]))
    calls = counted(monkeypatch)
    infer.infer(**two_files)
    assert calls == [4, 1, 2]  # of b one part is there
    found = read(tmp_path / "out" / "a-predict.jsonl-00000-of-00001")
    assert [line["inputs"]["inputs_pretokenized"] for line in found] == [*LINES[:4], "a last one"]


def test_without_a_folder_lines_go_to_standard_output(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one <extra_id_0>\n\ntwo\n")))
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
        ({"decoding": Decoding(num_decodes=2, topk=3)}, "beams are not drawn"),
        ({"seed": 1 << 70}, "SEED is 1180591620717411303424; expected 0 to 4294967295"),
        ({"extra_ids": 5, "sentencepiece_model_file": None}, "EXTRA_IDS is 5, but"),
        ({"infer_output_dir": ""}, "'' is no folder"),
        ({"infer_output_dir": __file__}, r"test_infer\.py' is no folder"),
        ({"prompts": "task:c4"}, "tasks of SeqIO are not read"),
        ({"decoding": Decoding(topk=3)}, "set TEMPERATURE"),
        ({"decoding": Decoding(temperature=1.0, topk=3, topp=0.5)}, "give one of them"),
        ({"num_expert_partitions": 0}, "NUM_EXPERT_PARTITIONS is 0; expected one that"),
        ({"implementation": "triton"}, "IMPLEMENTATION is 'triton', whose kernels need"),
        ({"sentencepiece_model_file": None}, "holds no sentencepiece.model"),
        ({"checkpoint_path": "/nowhere/checkpoint_1"}, "/nowhere/checkpoint_1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(given, tmp_path, changed, message):
    (tmp_path / "a.txt").write_text("x")
    given |= {"prompts": str(tmp_path / "a.txt"), "infer_output_dir": str(tmp_path / "out")}
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            infer.infer(**given | changed, dry_run=dry_run)
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
