# SPDX-License-Identifier: Apache-2.0
"""The command line from arguments to run, in this process; the console script once."""

import json
import pathlib
import subprocess
import sys

import gin
import pytest

from qmoe_jax import main

ROOT = pathlib.Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests/data/t5x/tiny_switch_base/legacy/checkpoint_500100"
DEMO = ROOT / "tests" / "data" / "text"
SMALL = (  # enough for one quick pass
    "--gin.NUM_SAMPLES=4",
    "--gin.NUM_VALIDATION_SAMPLES=2",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 24}",
    "--gin.DOCUMENT_MODE=split",
)
INPUTS = (f"--gin.CHECKPOINT_PATH={CHECKPOINT}", *SMALL)
TEXT = (
    f"--gin.SENTENCEPIECE_MODEL_FILE={DEMO / 'sentencepiece.model'}",
    f"--gin.CALIBRATION_FILES={DEMO / 'calibration.jsonl'}",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working folder that holds no gin files."""
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def call(*arguments: str) -> int:
    return main.main(["qmoe-jax", *arguments])


def compress_arguments(folder: pathlib.Path) -> tuple[str, ...]:
    return (*INPUTS, *TEXT, f"--gin.OUTPUT_DIR={folder / 'out'}")


def test_compress_dry_run_reads_its_defaults_and_writes_nothing(tmp_path, capsys):
    assert call("--dry_run", *compress_arguments(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "822,912 parameters" in shown and "calibration: 4 samples" in shown
    assert not list(tmp_path.iterdir())


def test_eval_dry_run(tmp_path, capsys):
    arguments = (*INPUTS, *TEXT, "--gin.VALIDATION_FILES=None", "--gin.EVAL_OUTPUT_DIR=out")
    assert call("--run_mode=eval", "--dry_run", *arguments) == 0
    shown = capsys.readouterr().out
    assert "(t5x)" in shown and "validation: 2 samples" in shown
    assert not list(tmp_path.iterdir())


def test_infer_from_a_file_to_the_folder(tmp_path, capsys):
    (tmp_path / "gaps.txt").write_text("one <extra_id_0> three\n")
    arguments = (
        f"--gin.CHECKPOINT_PATH={CHECKPOINT}",
        TEXT[0],
        "--gin.PROMPTS=gaps.txt",
        "--gin.INFER_OUTPUT_DIR=answers",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 4}",
        "--gin.NUM_DECODES=2",
    )
    assert call("--run_mode=infer", *arguments, "--gin.MODE=predict_with_aux") == 0
    (line,) = (
        (tmp_path / "answers/gaps-predict_with_aux.jsonl-00000-of-00001").read_text().splitlines()
    )
    assert json.loads(line)["inputs"] == {"inputs_pretokenized": "one <extra_id_0> three"}
    assert "NUM_DECODES = 2" in (tmp_path / "answers/config.gin").read_text()
    assert call("--run_mode=infer", *arguments, "--gin.MODE=guess") == 1
    assert "MODE is 'guess'; expected 'predict' or" in capsys.readouterr().err


def test_import_and_inspect(tmp_path, capsys, data_dir):
    pack = f"--gin.CHECKPOINT_PATH={data_dir / 'qmoe' / 'tiny_qmoe_ckpt'}"
    imports = ("--run_mode=import", pack, "--gin.OUTPUT_DIR=out", "--gin.EXPERTS_PER_GROUP=4")
    assert call("--dry_run", *imports) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert call(*imports) == 0
    assert "EXPERTS_PER_GROUP = 4" in (tmp_path / "out" / "config.gin").read_text()
    before = sorted(tmp_path.rglob("*"))
    assert call("--run_mode=inspect", "--gin.CHECKPOINT_PATH=out") == 0
    assert "2 files of up to 4 experts" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert call(*imports) == 1
    assert "out holds a finished packed checkpoint" in capsys.readouterr().err


def test_export_and_import(tmp_path, capsys, data_dir):
    pack = f"--gin.CHECKPOINT_PATH={data_dir / 'qmoe' / 'tiny_qmoe_ckpt'}"
    assert call("--run_mode=import", pack, "--gin.OUTPUT_DIR=store") == 0
    exports = ("--run_mode=export", "--gin.CHECKPOINT_PATH=store")
    assert call(*exports, "--gin.OUTPUT_DIR=orbax", "--gin.EXPORT_FORMAT=orbax") == 0
    assert call("--run_mode=import", "--gin.CHECKPOINT_PATH=orbax", "--gin.OUTPUT_DIR=back") == 0
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("store", "back")]
    assert manifests[0] == manifests[1]
    assert "EXPORT_FORMAT = 'orbax'" in (tmp_path / "orbax" / "config.gin").read_text()
    assert call(*exports, "--gin.OUTPUT_DIR=t5x", "--gin.EXPORT_FORMAT=t5x") == 0
    assert {path.name for path in (tmp_path / "t5x").iterdir()} == {"checkpoint_0", "config.gin"}
    capsys.readouterr()
    assert call(*exports, "--gin.OUTPUT_DIR=x", "--gin.EXPORT_FORMAT=onnx") == 1
    assert "EXPORT_FORMAT is 'onnx'; expected 't5x' or" in capsys.readouterr().err


def test_train_takes_its_model_from_a_second_file(tmp_path, capsys):
    arguments = (
        "--run_mode=train",
        "--dry_run",
        TEXT[0],
        f"--gin.TRAIN_FILES={DEMO / 'calibration.jsonl'}",
        "--gin.TRAIN_STEPS=3",
        "--gin.MODEL_DIR=model",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 24}",
    )
    assert call(*arguments) == 1
    error = "not set: MODEL; add --gin_file=t5x_configs/models/... for the model\n"
    assert capsys.readouterr().err == f"qmoe-jax: error: {error}"
    names = ("models/switch_demo", "runs/train")
    files = [f"--gin_file=t5x_configs/{name}.gin" for name in names]
    assert call(*arguments, *files) == 0
    assert "3,677,184 parameters, to step 3" in capsys.readouterr().out
    assert call(*arguments, *files, "--gin.OPTIMIZER=sgd") == 1
    assert "OPTIMIZER is 'sgd'; expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_eval_saves_its_config_which_repeats_it(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    quick = ("--gin.BATCH_TOKENS=128", f"--gin.VALIDATION_FILES={DEMO / 'heldout.jsonl'}")
    arguments = (*INPUTS, *TEXT, *quick, f'--gin.EVAL_OUTPUT_DIR="{first}"')
    assert call("--run_mode=eval", *arguments) == 0
    again = f"--gin_file={first / 'config.gin'}"
    assert call("--run_mode=eval", again, f"--gin.EVAL_OUTPUT_DIR={second}") == 0
    losses = [json.loads((f / "evaluation.json").read_text())["loss"] for f in (first, second)]
    assert losses[0] == losses[1]
    configs = [(f / "config.gin").read_text() for f in (first, second)]
    assert configs[0].replace(str(first), str(second)) == configs[1]


def test_eval_by_corpus_and_model(tmp_path, capsys, data_dir):
    corpora = {"held out": str(DEMO / "heldout.jsonl"), "rest": [str(DEMO / "calibration.jsonl")]}
    arguments = (
        "--run_mode=eval",
        *INPUTS,
        *TEXT,
        f"--gin.VALIDATION_FILES={corpora}",
        f"--gin.ORIGINAL_CHECKPOINT_PATH={CHECKPOINT}",
        "--gin.EVAL_OUTPUT_DIR=eval",
    )
    assert call(*arguments, "--gin.PACKED_MODELS=['packed']") == 1
    error = capsys.readouterr().err
    assert "PACKED_MODELS is ['packed'], but CHECKPOINT_PATH" in error and error.count("\n") == 1
    assert call(*arguments, "--gin.VALIDATION_FILES={'a': 3}") == 1
    assert "VALIDATION_FILES is {'a': 3}; expected " in capsys.readouterr().err
    assert call(*arguments) == 0
    saved = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert list(saved["corpora"]) == list(corpora)
    for own in saved["corpora"].values():
        assert own["losses"]["original"] == own["losses"]["checkpoint"]
        assert own["differences"]["checkpoint"] == {"difference": 0.0, "standard_error": 0.0}
    assert "VALIDATION_FILES = \\\n    {'held out'" in (tmp_path / "eval/config.gin").read_text()
    assert call(*compress_arguments(tmp_path), f"--gin.VALIDATION_FILES={corpora}") == 1
    assert "only eval gives losses by corpus" in capsys.readouterr().err


def test_later_files_and_settings_win(tmp_path, capsys):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "base.gin").write_text(
        "include 't5x_configs/runs/compress.gin'\nNUM_SAMPLES = 3\nNUM_VALIDATION_SAMPLES = 5\n"
    )
    (tmp_path / "search" / "own.gin").write_text("include 'base.gin'\nNUM_SAMPLES = 2\n")
    files = ("--gin_file=own.gin", f"--gin_search_paths={tmp_path / 'search'}")
    required = [a for a in compress_arguments(tmp_path) if "SAMPLES" not in a]
    assert call("--dry_run", *required, *files) == 0
    captured = capsys.readouterr()
    assert "calibration: 2 samples" in captured.out and "validation: 5 samples" in captured.out
    assert "Path not found" not in captured.err
    assert call("--dry_run", *required, *files, "--gin.compress.num_samples=1") == 0
    assert "calibration: 1 samples" in capsys.readouterr().out


def test_a_model_file_may_be_loaded_too(tmp_path):
    files = (
        "--gin_file=t5x_configs/models/switch_base_8.gin",
        "--gin_file=t5x_configs/runs/compress.gin",
    )
    assert call("--dry_run", *files, *compress_arguments(tmp_path)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # names
        (
            ["--gin.NUM_SAMPELS=3"],
            "no gin file uses NUM_SAMPELS; did you mean NUM_SAMPLES or NUM_VALIDATION_SAMPLES?",
        ),
        (
            ["--gin.Quantizer.bit=3"],
            "--gin.Quantizer.bit: Configurable 'Quantizer' doesn't have a parameter named 'bit'; "
            "did you mean Quantizer.bits or ",
        ),
        (
            ["--gin.Quantiser.bits=3"],
            "--gin.Quantiser.bits: No configurable matching 'Quantiser'; "
            "did you mean Quantizer.bits or ",
        ),
        (
            ["--gin.compress.quantizer=@Quantiser()"],
            "--gin.compress.quantizer: No configurable matching reference '@Quantiser()'",
        ),
        (["--gin.BITS=%MY_BITS"], "not set: MY_BITS; add --gin.MY_BITS=... and so on"),
        # values
        (
            ["--gin.TASK_FEATURE_LENGTHS={inputs: 512}"],
            "cannot read `TASK_FEATURE_LENGTHS = {inputs: 512}`; expected NAME = VALUE, text in",
        ),
        (["--gin.CALIBRATION_FILES=['a'"], "--gin.CALIBRATION_FILES: a bracket or quote is not "),
        (["--process_count=2"], "--process_count: of no effect without --multiprocess_gpu"),
        (["--multiprocess_gpu", "--run_mode=eval"], "--multiprocess_gpu is for compress: start ev"),
        (["--gin.NUM_SAMPLES=ten"], "NUM_SAMPLES is 'ten'; expected int or None"),
        (
            ["--gin.compress.codec=zip"],
            "compress.codec is 'zip'; expected 'qmoe' or 'tunstall' or ",
        ),
        (["--gin.BITS=5"], "BITS is 5; expected 'ternary' (or 1.5), 2, 3 or 4"),
        (["--gin.METHOD=rtm"], "METHOD is 'rtm'; expected 'gptq' or 'rtn'"),
        (["--gin.CHECKPOINT_PATH=/nowhere"], "/nowhere "),
        # files and flags
        (["--gin_file=no.gin"], "no gin file no.gin in the working folder or "),
        (
            ["--gin_file=t5x_configs/models/switch_base_8.gin"],
            "no gin file is for compress; add --gin_file=t5x_configs/runs/compress.gin",
        ),
        (["--gin_search_path=x"], "Unknown command line flag 'gin_search_path'. Did you mean: "),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    assert call(*compress_arguments(tmp_path), *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"qmoe-jax: error: {message}")
    assert error.count("\n") == 1 and " object at 0x" not in error
    assert not list(tmp_path.iterdir())


def test_all_that_must_be_set_is_named_at_once(capsys):
    assert call() == 1
    assert capsys.readouterr().err == (
        "qmoe-jax: error: not set: CALIBRATION_FILES, CHECKPOINT_PATH, OUTPUT_DIR, "
        "SENTENCEPIECE_MODEL_FILE; add --gin.CALIBRATION_FILES=... and so on\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import no_such_module", "No module named 'no_such_module' In file \"{file}\", line 3"),
        ("include 'no/such.gin'", "Unable to open file: no/such.gin"),
        ("text.Text.sead = 3", "Configurable 'text.Text' doesn't have a parameter named 'sead'"),
        ("BITS = ternary", "{file}, line 3: cannot read `BITS = ternary`"),
        ("BITS", "{file}, line 3: cannot read `BITS`; expected NAME = VALUE"),
    ],
)
def test_a_mistake_in_a_file_names_the_line(line, message, tmp_path, capsys):
    file = tmp_path / "own.gin"
    file.write_text(f"include 't5x_configs/runs/compress.gin'\nSEED = 1\n{line}\n")
    assert call(f"--gin_file={file}") == 1
    error = capsys.readouterr().err
    assert message.format(file=file) in error
    assert "line 3" in error and error.count("\n") == 1


def test_traceback_shows_where(tmp_path):
    with pytest.raises(ValueError, match="BITS is 5"):
        call(*compress_arguments(tmp_path), "--gin.BITS=5", "--traceback")


def test_faults_of_the_program_are_not_disguised(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr("qmoe_jax.runs.compress.text.load", broken)
    with pytest.raises(TypeError, match="a bug"):
        call(*compress_arguments(tmp_path), "--dry_run")


def test_console_script(tmp_path):
    script = pathlib.Path(sys.executable).with_name("qmoe-jax")
    arguments = [str(script), "--dry_run", *compress_arguments(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dry run" in done.stdout


def test_out_of_memory_and_an_interrupt_end_in_one_line(tmp_path, monkeypatch, capsys):
    def fail_with(error):
        def failing(checkpoint_path, output_dir, text_options, **options):
            raise error

        arguments = dict.fromkeys(("checkpoint_path", "output_dir", "text_options"), "")
        monkeypatch.setattr(main, "configure", lambda *_: arguments)
        monkeypatch.setitem(main.RUN_MODES, "compress", (failing, "output_dir"))
        return call(*compress_arguments(tmp_path))

    assert fail_with(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")) == 1
    assert "lower EXPERTS_PER_GROUP" in capsys.readouterr().err
    assert fail_with(KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        fail_with(RuntimeError("a bug"))
