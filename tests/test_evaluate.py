# SPDX-License-Identifier: Apache-2.0
import dataclasses
import io
import json
from typing import Any

import pytest
import rich.console

from pallas_kernels.grid_levels import Bits
from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import Codec
from qmoe_jax.inference import packed_walk
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs import compress, evaluate


@pytest.fixture(scope="session")
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


def checkpoint(data_dir, name="tiny_switch_base"):
    return str(data_dir / "t5x" / name / "legacy")


@pytest.fixture(scope="session")
def corpora(text, request):
    """Two corpora of unlike text."""
    data = request.config.rootpath / "tests" / "data"
    files = {
        "reference": [str(data / "text" / "heldout.jsonl")],
        "code/python": str(data / "text" / "calibration.jsonl"),
    }
    return dataclasses.replace(text, validation_files=files, files=())


@pytest.fixture(scope="session")
def packs(text, data_dir, tmp_path_factory):
    """Packs of each codec in groups of 3, 3 and 2 experts, and their reports."""
    folder = tmp_path_factory.mktemp("packs")
    heldout = dataclasses.replace(text, validation_files=[text.files])  # with another seed
    options: dict[str, Any] = {
        "compute": compress.Compute(experts_per_group=3),
        "num_samples": 8,
        "num_validation_samples": 4,
    }
    made = {}
    kinds: tuple[tuple[Codec, Bits], ...]
    kinds = ("qmoe", "ternary"), ("tunstall", "ternary"), ("uniform", 2)
    for name, bits in kinds:
        path = folder / name
        report = compress.compress(
            checkpoint(data_dir),
            str(path),
            heldout,
            quantizer=Quantizer(bits=bits),
            codec=name,
            console=quiet(),
            **options,
        )
        made[name] = str(path), report
    return made


def run(path, options, **more):
    more = {"num_validation_samples": 4, "console": quiet()} | more
    return evaluate.evaluate(path, options, **more)


def test_losses_by_corpus_are_those_of_separate_runs(corpora, packs, data_dir):
    path, report = packs["qmoe"]
    original = checkpoint(data_dir)
    found = run(path, corpora, original_checkpoint_path=original)
    assert list(found["corpora"]) == ["reference", "code/python"]
    assert list(found["models"].items()) == [
        ("original", original + "/checkpoint_500100"),
        ("dequantized", path),
    ]
    for name, files in corpora.validation_files.items():
        alone = dataclasses.replace(corpora, validation_files=files)
        own = found["corpora"][name]
        for model, place in (("original", original), ("dequantized", path)):
            separate = run(place, alone)
            assert own["losses"][model]["loss"] == separate["loss"]
            assert own["losses"][model]["standard_error"] == separate["standard_error"]
            assert own["samples"] == separate["samples"] == 4
            assert own["fingerprint"] == separate["fingerprint"]
    both = found["corpora"].values()
    weighted = sum(own["targets"] * own["losses"]["dequantized"]["loss"] for own in both)
    assert found["targets"] == sum(own["targets"] for own in both)
    assert found["loss"] == pytest.approx(weighted / found["targets"], rel=1e-12)
    assert found["loss"] == found["losses"]["dequantized"]["loss"]
    # The last corpus is the text that the compression validated on.
    assert own["losses"]["original"]["loss"] == report.losses["original"]
    assert own["losses"]["dequantized"]["loss"] == report.losses["compressed"]
    change = own["differences"]["dequantized"]
    assert change["difference"] == pytest.approx(
        report.losses["compressed"] - report.losses["original"], abs=1e-12
    )
    assert change["standard_error"] == report.standard_errors["compressed"]
    assert abs(change["difference"]) > 1e-4


@pytest.mark.parametrize("codec", ["qmoe", "tunstall", "uniform"])
def test_packed_weights_give_the_losses_of_the_dense_ones(codec, corpora, packs, monkeypatch):
    path, _ = packs[codec]
    calls = []

    def counted(*arguments):
        calls.append(arguments[3])
        run_packed(*arguments)

    run_packed = packed_walk.run_packed_experts
    monkeypatch.setattr(packed_walk, "run_packed_experts", counted)
    found = run(path, corpora, packed_models=["dequantized", "packed"])
    layers = len(packs[codec][1].layers)
    assert sorted(calls) == sorted(2 * layers * [0, 3, 6])
    for own in (found, *found["corpora"].values()):
        assert abs(own["differences"]["packed"]["difference"]) < 1e-5
        assert own["losses"]["packed"]["loss"] == pytest.approx(
            own["losses"]["dequantized"]["loss"], abs=1e-5
        )
    alone = run(path, corpora)
    assert alone["losses"] == {"dequantized": found["losses"]["dequantized"]}
    assert alone["differences"] == {}
    assert run(path, corpora, packed_models="packed")["loss"] == found["losses"]["packed"]["loss"]


def test_the_table_and_the_progress_of_several_models(corpora, packs, data_dir, tmp_path):
    out = io.StringIO()
    run(
        packs["qmoe"][0],
        corpora,
        original_checkpoint_path=checkpoint(data_dir),
        packed_models=("packed", "dequantized"),
        compute=compress.Compute(buffer_dir=str(tmp_path / "buffers")),
        console=rich.console.Console(file=out, width=80),
    )
    shown = out.getvalue()
    lines = [line for line in shown.splitlines() if "% done" in line]
    assert len({line.partition(":")[0] for line in lines}) == len(lines)  # each block once a walk
    assert lines[0].startswith("original, encoder block 1 of")
    assert (
        lines[-1].startswith("packed and dequantized, decoder block") and "100% done" in lines[-1]
    )
    shares = [int(line.partition("(")[2].partition("%")[0]) for line in lines]
    assert shares == sorted(shares) and 25 < shares[len(shares) // 2 - 1] < 40  # of 3 equal parts
    rows = [line.split("│") for line in shown.splitlines() if " ± " in line]
    names = [row[1].strip() for row in rows]
    assert names == ["reference", "", "code/python", "", "all", ""]  # loss, then difference
    assert [sum(" ± " in cell for cell in row) for row in rows] == [3, 2, 3, 2, 3, 2]
    assert not list((tmp_path / "buffers").iterdir())


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("dense", "PACKED_MODELS is 'dense'; expected 'dequantized', 'packed' or a list of both"),
        ((), "expected 'dequantized', 'packed' or a list"),
        (("packed", "original"), "expected 'dequantized', 'packed' or a list"),
        (("packed", "packed"), "expected 'dequantized', 'packed' or a list"),
    ],
)
def test_forms_that_there_are_not(models, message, corpora, packs):
    with pytest.raises(ValueError, match=message):
        run(packs["qmoe"][0], corpora, packed_models=models, dry_run=True)


def test_models_that_do_not_go_together(corpora, packs, data_dir, text, tmp_path):
    pack, original = packs["qmoe"][0], checkpoint(data_dir)
    for form in ("packed", "dequantized"):
        with pytest.raises(ValueError, match=r"is not packed \(t5x\): leave PACKED_MODELS out"):
            run(original, corpora, packed_models=form)
    with pytest.raises(ValueError, match=r"ORIGINAL_CHECKPOINT_PATH .* is a packed checkpoint"):
        run(pack, corpora, original_checkpoint_path=pack)
    with pytest.raises(CheckpointError, match="is another model than CHECKPOINT_PATH"):
        run(pack, corpora, original_checkpoint_path=checkpoint(data_dir, "tiny_switch_c"))
    held_back = {"num_samples": 1, "num_validation_samples": 1, "console": quiet()}
    compress.compress(
        original,
        str(tmp_path / "out"),
        text,
        quantizer=Quantizer(method="rtn"),
        codec="dense",
        **held_back,
    )
    with pytest.raises(ValueError, match="are stored dense"):
        run(str(tmp_path / "out"), corpora, packed_models="packed")


def test_corpora_that_cannot_be(corpora, text, data_dir, tmp_path):
    path = checkpoint(data_dir)
    (tmp_path / "none.txt").write_text("\n")
    wrong = {
        r"VALIDATION_FILES is \{\}; expected at least one corpus": {},
        "expected at least one corpus": {"": "a.txt"},
        "has a corpus 'all'": {"all": "a.txt"},
        "corpus 'wiki' of VALIDATION_FILES: the text gave 0 of the 4": {
            **corpora.validation_files,
            "wiki": str(tmp_path / "none.txt"),
        },
        "corpus 'web' of VALIDATION_FILES: no text file matches": {"web": str(tmp_path / "no.txt")},
        "corpus 'web' of VALIDATION_FILES: no text is named": {"web": ()},
    }
    for message, files in wrong.items():
        with pytest.raises(ValueError, match=message):
            run(path, dataclasses.replace(text, validation_files=files))
    for method in ("gptq", "rtn"):
        quantizer = Quantizer(method=method)
        with pytest.raises(ValueError, match=r"is a dict .*only eval gives losses by corpus"):
            compress.compress(
                path, str(tmp_path / "out"), corpora, quantizer=quantizer, console=quiet()
            )
    assert not (tmp_path / "out").exists()
