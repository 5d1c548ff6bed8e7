# SPDX-License-Identifier: Apache-2.0
"""Every gin file parses, finalizes and means what the code and the documentation say."""

import dataclasses
import inspect
import json
import math
import pathlib
import re

import gin
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from qmoe_jax import bindings, main
from qmoe_jax.models import config, presets
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.switch import Switch
from qmoe_jax.quantization.quantizer import Quantizer

ROOT = pathlib.Path(__file__).parents[1]
SIZES = {  # model: parameters; capacity factors of training and evaluation, minimum, router group
    "switch_base_8": (619_339_008, 1.25, 2.0, 4, 8192),
    "switch_base_16": (1_072_397_568, 1.25, 2.0, 4, 8192),
    "switch_base_32": (1_978_514_688, 1.25, 2.0, 4, 8192),
    "switch_base_64": (3_790_748_928, 1.25, 2.0, 4, 8192),
    "switch_base_128": (7_415_217_408, 1.25, 2.0, 4, 8192),
    "switch_base_256": (14_664_154_368, 1.25, 2.0, 4, 8192),
    "switch_large_128": (26_309_291_008, 1.25, 2.0, 4, 4096),
    "switch_xxl_128": (394_675_073_024, 1.25, 4.0, 2, 4096),
    "switch_c_2048": (1_571_327_875_360, 1.0, 2.0, 2, 2048),
}
OWN_MODELS = ("switch_demo",)  # not released ones
REQUIRED = {  # run mode: what its file leaves open
    "compress": {"CHECKPOINT_PATH", "OUTPUT_DIR", "SENTENCEPIECE_MODEL_FILE", "CALIBRATION_FILES"},
    "eval": {"CHECKPOINT_PATH", "EVAL_OUTPUT_DIR", "VALIDATION_FILES"},
    "export": {"CHECKPOINT_PATH", "OUTPUT_DIR", "EXPORT_FORMAT"},
    "import": {"CHECKPOINT_PATH", "OUTPUT_DIR"},
    "infer": {"CHECKPOINT_PATH", "INFER_OUTPUT_DIR", "PROMPTS"},
    "inspect": {"CHECKPOINT_PATH"},
    "plan": set(),
    "train": {"MODEL_DIR", "SENTENCEPIECE_MODEL_FILE", "TRAIN_FILES", "TRAIN_STEPS"},
}
NOT_SETTINGS = {"dry_run", "console"}  # given by the command line


@pytest.fixture(autouse=True)
def clean_gin():
    gin.clear_config()
    gin.add_config_file_search_path(str(ROOT))
    yield
    gin.clear_config()


def macros(path: pathlib.Path) -> dict[str, str]:
    """The macros that a gin file sets itself, as written there."""
    lines = re.findall(r"^([A-Z_]+) = ([^#\n]*[^#\s])", path.read_text(), re.MULTILINE)
    return dict(lines)


def load_model(name: str) -> SwitchConfig:
    gin.parse_config_file(f"t5x_configs/models/{name}.gin")
    gin.finalize()
    return gin.get_configurable("MODEL/gin.macro")()


def model_files() -> set[str]:
    return {path.stem for path in (ROOT / "t5x_configs" / "models").glob("*.gin")}


def test_there_is_a_file_for_each_model_and_run_mode():
    assert model_files() == {"switch", *SIZES, *OWN_MODELS}
    runs = {path.stem for path in (ROOT / "t5x_configs" / "runs").glob("*.gin")}
    assert runs - {"compress_paper"} == set(REQUIRED) == set(main.RUN_MODES)


def test_the_settings_of_the_paper_are_all_there():
    """Not by default: each is set, and to what it is in the published code."""
    own = macros(ROOT / "t5x_configs/runs/compress_paper.gin")
    fields = {field.name for field in dataclasses.fields(Quantizer)} - {"sweeps", "penalty"}
    assert {name.upper() for name in fields} | {"LAMBDA"} <= own.keys()
    gin.parse_config_file("t5x_configs/runs/compress_paper.gin")
    found = {name: gin.query_parameter(f"{name}/gin.macro.value") for name in own}
    assert found | {"NUM_SAMPLES": None} == {
        "NUM_SAMPLES": None,
        "TASK_FEATURE_LENGTHS": {"inputs": 512, "targets": 114},
        "DOCUMENT_MODE": "skip",
        "METHOD": "gptq",
        "BITS": "ternary",
        "GRID": "minmax",
        "LAMBDA": 0.0,
        "DAMPING": 0.1,
        "BLOCK_SIZE": 128,
        "GROUP_SIZE": None,
        "ACTIVATION_ORDER": False,
        "TRUE_SEQUENTIAL": False,
        "TOKEN_CAP": 4.0,
        "MASK_SPECIAL_TOKENS": True,
        "CODEC": "qmoe",
        "STORE_DTYPE": "bfloat16",
    }


@pytest.mark.parametrize("name", SIZES)
def test_model_has_the_tree_of_the_released_checkpoint(name, data_dir):
    trees = json.loads((data_dir / "t5x" / "released_param_trees.json").read_text())
    released = trees[name.replace("_", "-")]
    model = load_model(name)
    shapes = config.param_shapes(model)
    assert shapes == {path: tuple(shape) for path, shape in released["params"].items()}
    assert list(model.encoder_sparse_layers) == released["sparse_enc"]
    assert list(model.decoder_sparse_layers) == released["sparse_dec"]
    assert gin.query_parameter("NUM_EXPERTS/gin.macro.value") == model.num_experts
    assert SIZES[name] == (
        sum(map(math.prod, shapes.values())),
        model.train_capacity_factor,
        model.eval_capacity_factor,
        model.min_expert_capacity,
        model.group_size,
    )


@pytest.mark.parametrize("name", ["switch_base_8", "switch_xxl_128", *OWN_MODELS])
def test_model_is_built_with_that_tree(name):
    model = load_model(name)
    tokens = jnp.ones((1, 4), jnp.int32)
    made = jax.eval_shape(Switch(model).init, jax.random.key(0), tokens, tokens, tokens)
    shapes = jax.tree.map(lambda leaf: leaf.shape, made["params"])
    assert flatten_dict(shapes, sep="/") == config.param_shapes(model)


@pytest.mark.parametrize("name", [*SIZES, *OWN_MODELS])
def test_model_files_are_short(name):
    lines = (ROOT / "t5x_configs" / "models" / f"{name}.gin").read_text().splitlines()
    assert len(lines) <= 15
    assert lines[1].endswith("Provides MODEL and NUM_EXPERTS.")


def test_model_without_sizes_tells_what_is_missing():
    gin.parse_config_file("t5x_configs/models/switch.gin")
    sizes = macros(ROOT / "t5x_configs/models/switch.gin")
    required = {name for name, value in sizes.items() if value == "%gin.REQUIRED"}
    assert set(bindings.missing_names(gin.config_str())) == required


@pytest.mark.parametrize(
    ("layers", "sparse", "expected"),
    [(12, 6, (1, 3, 5, 7, 9, 11)), (3, 3, (0, 1, 2)), (6, 2, (2, 5)), (4, 0, ())],
)
def test_mixed_layout(layers, sparse, expected):
    assert presets.mixed_layout(layers, sparse) == expected


@pytest.mark.parametrize(("layers", "sparse"), [(12, 5), (12, 13), (12, -1)])
def test_uneven_layout_is_refused(layers, sparse):
    with pytest.raises(ValueError, match="cannot be spread evenly"):
        presets.mixed_layout(layers, sparse)


def load_run(mode: str) -> None:
    gin.parse_config_file("t5x_configs/models/switch_demo.gin")  # `train` reads MODEL from it
    gin.parse_config_file(f"t5x_configs/runs/{mode}.gin")
    gin.parse_config([f"{name} = 'given'" for name in REQUIRED[mode]])
    gin.finalize()


@pytest.mark.parametrize("mode", REQUIRED)
def test_run_file_binds_every_setting_to_its_default(mode):
    load_run(mode)
    function, _ = main.RUN_MODES[mode]
    for configurable in (function, *bindings.records(function)):
        parameters = inspect.signature(configurable).parameters
        bound = gin.get_bindings(configurable)
        assert bound.keys() == parameters.keys() - NOT_SETTINGS
        given = {name: value for name, value in bound.items() if value == "given"}
        if configurable is SwitchConfig:
            continue  # bound by the model's file
        if configurable is not function:
            assert gin.get_configurable(configurable)() == configurable(**given)
            continue
        records = {"text_options", "model"}  # those that have no default
        for name in bound.keys() - given.keys() - records:
            assert bound[name] == parameters[name].default, name


@pytest.mark.parametrize("mode", REQUIRED)
def test_run_file_opens_with_what_must_be_set_and_what_may(mode):
    path = ROOT / "t5x_configs" / "runs" / f"{mode}.gin"
    head, _, rest = path.read_text().partition("from __gin__ import dynamic_registration")
    required, _, overridden = head.partition("# Commonly overridden:")
    assert "# Required to be set:" in required
    set_here = macros(path)
    assert {name for name, value in set_here.items() if value == "%gin.REQUIRED"} == REQUIRED[mode]
    assert set(re.findall(r"^# - (\w+):", required, re.MULTILINE)) == REQUIRED[mode]
    common = {
        name
        for names in re.findall(r"^# - ([A-Z_, ]+)", overridden, re.MULTILINE)
        for name in names.split(", ")
    }
    assert common and common <= set_here.keys() - REQUIRED[mode]
    assert all(f"= %{name}\n" in rest for name in set_here), "a macro that nothing reads"


@pytest.mark.parametrize("mode", REQUIRED)
def test_every_run_mode_can_be_tried_dry_and_has_an_output_folder(mode):
    """But for one that writes nothing."""
    function, folder = main.RUN_MODES[mode]
    assert {"dry_run", folder} - {None} <= inspect.signature(function).parameters.keys()
    assert (folder is None) == (mode in ("inspect", "plan"))


def test_models_and_runs_share_no_macro():
    """Either file may be loaded first: a shared name would mean two things."""
    sizes = macros(ROOT / "t5x_configs/models/switch.gin").keys()
    for mode in REQUIRED:
        assert not sizes & macros(ROOT / f"t5x_configs/runs/{mode}.gin").keys()


def documented(section: str) -> dict[str, str]:
    """Macro -> default, from the table of a section; those taken over from `compress` too."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", body, re.MULTILINE))
    _, _, same = body.partition("As for `compress`:")
    names = re.findall(r"`([A-Z_]+)`", same)
    assert not rows.keys() & set(names)
    return rows | {name: documented("`compress`")[name] for name in names}


@pytest.mark.parametrize(
    ("section", "file"),
    [
        ("`compress`", "runs/compress.gin"),
        ("`eval`", "runs/eval.gin"),
        ("`export`", "runs/export.gin"),
        ("`import`", "runs/import.gin"),
        ("`infer`", "runs/infer.gin"),
        ("`inspect`", "runs/inspect.gin"),
        ("`plan`", "runs/plan.gin"),
        ("`train`", "runs/train.gin"),
        ("Model files", "models/switch.gin"),
    ],
)
def test_documentation_lists_each_macro_with_its_default(section, file):
    written = macros(ROOT / "t5x_configs" / file)
    written.pop("MODEL", None)
    shown = {
        name: "required" if value == "%gin.REQUIRED" else f"`{value}`"
        for name, value in written.items()
    }
    assert documented(section) == shown


def test_library_code_knows_nothing_of_gin():
    paths = [
        path for folder in ("qmoe_jax", "pallas_kernels") for path in (ROOT / folder).rglob("*.py")
    ]
    pattern = re.compile(r"^\s*(import|from) gin\b", re.MULTILINE)
    assert [path.name for path in paths if pattern.search(path.read_text())] == ["main.py"]


@pytest.mark.parametrize("file", ["train_short.gin", "train.gin"])
def test_the_demos_training_is_a_run_that_could_begin(file, monkeypatch, tmp_path, capsys):
    """Its text and the first steps' checkpoint are made on demand: others stand in."""
    monkeypatch.chdir(ROOT)
    settings = [f"MODEL_DIR={tmp_path}", "TRAIN_FILES=examples/demo/calibration.jsonl"]
    if file == "train.gin":
        settings.append("INITIAL_CHECKPOINT_PATH=None")
    flags = ["--run_mode=train", f"--gin_file=examples/demo/{file}", "--dry_run"]
    assert main.main(["qmoe-jax", *flags, *(f"--gin.{setting}" for setting in settings)]) == 0
    assert "4,201,472 parameters" in capsys.readouterr().out
