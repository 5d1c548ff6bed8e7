# SPDX-License-Identifier: Apache-2.0
"""The page says what report.json says, of any run, in any browser, and fetches nothing."""

import copy
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import gin
import matplotlib.image
import numpy as np
import pytest
from report_records import Parsed, plots, row, synthetic

from qmoe_jax import main
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.report_page import page as report_page
from qmoe_jax.report_page import run as report_run

ROOT = pathlib.Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAPER = {"light": (0xF7, 0xF7, 0xF4), "dark": (0x12, 0x15, 0x17)}  # of the style sheet


@pytest.fixture(scope="module")
def small():
    return synthetic(sparse=2, experts=8)


@pytest.fixture(scope="module")
def pack(data_dir, tmp_path_factory):
    """A run from the command line whose validation samples are held back."""
    folder = tmp_path_factory.mktemp("pack") / "out"
    settings = {
        "CHECKPOINT_PATH": data_dir / "t5x/tiny_switch_base/legacy/checkpoint_500100",
        "OUTPUT_DIR": folder,
        "SENTENCEPIECE_MODEL_FILE": data_dir / "text/sentencepiece.model",
        "CALIBRATION_FILES": data_dir / "text/calibration.jsonl",
        "NUM_SAMPLES": 6,
        "NUM_VALIDATION_SAMPLES": 3,
        "TASK_FEATURE_LENGTHS": {"inputs": 24},
        "DOCUMENT_MODE": "split",
        "COMPARE_ROUND_TO_NEAREST": True,
    }
    call("compress", *(f"--gin.{name}={value}" for name, value in settings.items()))
    return folder


def call(run_mode, *settings):
    try:
        assert main.main(["qmoe-jax", f"--run_mode={run_mode}", *settings]) == 0
    finally:
        gin.clear_config()


def test_a_run_leaves_the_page_that_its_report_gives(pack):
    written = (pack / "report.html").read_text()
    record = json.loads((pack / "report.json").read_text())
    assert written == report_page.page(record)
    (pack / "report.html").unlink()
    assert report_page.make(pack) == pack / "report.html"
    assert (pack / "report.html").read_text() == written


def test_numbers_are_those_of_the_report(pack):
    record = json.loads((pack / "report.json").read_text())
    page = report_page.page(record)
    said = Parsed(page).text
    losses, errors, totals = (record[key] for key in ("losses", "standard_errors", "totals"))
    for name in ("round_to_nearest", "compressed"):
        difference = f"{losses[name] - losses['original']:+.4f} ± {errors[name]:.4f}"
        assert f"{losses[name]:.4f} ({difference})" in said
    assert f"original {losses['original']:.4f} ± {errors['original']:.4f}" in said
    assert "legacy/ checkpoint_500100 GPTQ, ternary, codec qmoe 822,912 parameters" in said
    for key in ("expert_compression", "compression"):
        assert f"{totals[key]:.2f}×" in said
    for key in ("bits_per_expert_weight", "entropy_per_expert_weight", "bits_per_parameter"):
        assert f"{totals[key]:.3f}" in said
    layer = record["layers"][2]
    wi, wo = layer["matrices"]["wi"], layer["matrices"]["wo"]
    tokens = sorted(layer["tokens"])
    assert row(page, "decoder 1") == [
        f"{(wi['zeros'] + wo['zeros']) / (2 * wi['weights']):.1%}",
        f"{(wi['bits'] + wo['bits']) / (2 * wi['weights']):.3f}",
        *(f"{np.median([e for e in m['error'] if e is not None]):.4f}" for m in (wi, wo)),
        *(f"{count:,.0f}" for count in (tokens[0], np.median(tokens), tokens[-1])),
        str(len(layer["fallbacks"])),
        f"{layer['seconds']:,.1f}",
    ]
    for phase, seconds in record["seconds"].items():
        assert f"{phase} {seconds:,.1f} s" in said
    fingerprint = record["samples"]["calibration"]["fingerprint"]
    assert row(page, "fingerprint")[0] == f"{fingerprint[:10]}…"
    for place, expert in enumerate(record["layers"][0]["hessian_tokens"]):
        assert row(page, str(place))[1] == f"{expert:,}"


def test_the_command_of_the_page_gives_the_loss_of_the_page(pack, tmp_path):
    record = json.loads((pack / "report.json").read_text())
    command = " ".join(report_run.eval_command(record))
    assert report_run.eval_command(record)[3] in Parsed((pack / "report.html").read_text()).text
    told = command.replace("=PACK", f"={pack}").replace(
        "EVAL_OUTPUT_DIR=None", f"EVAL_OUTPUT_DIR={tmp_path}"
    )
    _, run_mode, *settings = shlex.split(told)
    call(run_mode.removeprefix("--run_mode="), *settings)
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["loss"] == record["losses"]["compressed"]


def test_the_parts_are_there_and_plots_have_names(small):
    page = report_page.page(small)
    parsed = Parsed(page)
    for title in ("Layers", "Experts", "Fallbacks", "Use it", "Machine", "Samples", "Settings"):
        assert title in parsed.text
    assert [label.split(":")[0] for label in plots(page)] == [
        "Loss, nats per token",
        "Zeros of each layer, per cent",
        "Stored bits per weight of each layer",
        "Relative error of the experts of each layer",
        "Calibration tokens of each layer's experts",
        "Time by phase",
    ]
    assert 'import qmoe_jax model = qmoe_jax.load("PACK")' in parsed.text
    assert row(page, "files")[0].endswith("and 44 more in report.json")


def round_to_nearest(record):
    record["settings"]["quantizer"] |= {"method": "rtn", "bits": 4}
    record["settings"]["codec"] = "dense"
    record["samples"] = {}
    for layer in record["layers"]:
        layer.update(tokens=[], hessian_tokens=[], fallbacks={})


def without_losses(record):
    record.update(losses={}, standard_errors={})


def infinite_loss(record):
    record["losses"]["compressed"] = None


def without_errors(record):
    for layer in record["layers"]:
        for matrix in layer["matrices"].values():
            matrix["error"] = [None] * len(matrix["error"])


def old(record):
    del record["standard_errors"]


def hugging_face(record):
    record["checkpoint"] |= {
        "path": "C:\\models\\switch-base-8",
        "format": "huggingface",
        "step": None,
    }


def no_fallbacks(record):
    for layer in record["layers"]:
        layer["fallbacks"] = {}


def fallbacks(record):
    record["layers"][1]["fallbacks"] = {"5": "Hessian not positive definite (wo)"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (round_to_nearest, ("round to nearest, 4 bits, codec dense", "nothing was calibrated")),
        (without_losses, ("Masked-span loss Not measured.", "no validation samples")),
        (infinite_loss, ("Loss not measured", "round to nearest 2.1500 (+0.9700 ± 0.0100)")),
        (without_errors, ("Relative error Not measured.",)),
        (old, ("compressed 1.2600 (+0.0800)",)),
        (hugging_face, ("switch-base-8 GPTQ", "6.28 TB in huggingface 1")),
        (no_fallbacks, ("Fallbacks to round-to-nearest None.",)),
        (fallbacks, ("encoder 3 Hessian not positive definite (wo) 1 5",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_reports_of_other_runs(change, said, small):
    record = copy.deepcopy(small)
    change(record)
    page = report_page.page(record)
    plots(page)
    text = Parsed(page).text
    for expected in said:
        assert expected.removesuffix(" 1") in text


@pytest.mark.parametrize(
    ("stacks", "experts", "matrices"),
    [(("decoder",), 1, ("wi", "wo")), (("encoder",), 8, ("wi_0", "wi_1", "wo"))],
)
def test_other_models(stacks, experts, matrices):
    page = report_page.page(synthetic(stacks, 1, experts, matrices))
    assert len(row(page, f"{stacks[0]} 1")) == 7 + len(matrices)
    assert f'<span class="key k{len(matrices) - 1}">wo</span>' in page


HOSTILE = "</title></style><script>alert(1)</script>\"'><img src=http://x onerror=a>&amp;\udcff"


def hostile(value, places=()) -> Any:
    """All texts of a record, keys of open sets included, made hostile."""
    if isinstance(value, dict):
        named = places in (
            (),
            ("checkpoint",),
            ("totals",),
            ("settings",),
            ("settings", "quantizer"),
        )
        named |= places in (("settings", "text"), ("layers",), ("layers", "matrices", HOSTILE))
        return {
            key if named or key in ("original", "compressed", "counts") else HOSTILE: hostile(
                item, (*places, key if named else HOSTILE)
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item, places) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_whatever_a_report_holds_is_only_text(small):
    record = hostile(small)
    assert record["layers"][0]["stack"] == HOSTILE and HOSTILE in record["layers"][0]["matrices"]
    page = report_page.page(record)
    page.encode()
    parsed = Parsed(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert parsed.tags.count("style") == 1
    assert "<script>alert(1)</script>" in parsed.text
    plots(page)


def test_nothing_is_fetched(small):
    page = report_page.page(small)
    assert not re.search(r"(src|href|srcset|data)\s*=", page)
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page


def test_the_same_report_gives_the_same_bytes(small, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(small))
    command = [sys.executable, "-W", "error", "-m", "qmoe_jax.report_page", str(tmp_path)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_bytes() == report_page.page(small).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'"text"', b"[" * 100_000, b'{"layers": []}'],
)
def test_a_damaged_report_is_named(content, tmp_path, capsys):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"report\.json is damaged, or no report"):
        report_page.make(tmp_path)
    assert report_page.main([str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("totals",), {}),
        (("layers",), [None]),
        (("layers", 0, "matrices", "wi", "weights"), 0),
        (("layers", 0, "matrices", "wi", "bits"), 10**400),
        (("layers", 0, "matrices", "wi", "error"), ["a"]),
        (("checkpoint", "parameters"), "many"),
        (("samples",), 3),
    ],
    ids=str,
)
def test_a_report_with_a_wrong_value_is_named(place, value, small, tmp_path):
    record = copy.deepcopy(small)
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"report\.json is damaged, or no report"):
        report_page.make(tmp_path)


def test_what_is_not_finite_is_not_measured(small, tmp_path):
    record = copy.deepcopy(small)
    record["losses"]["compressed"] = float("nan")  # json.dumps writes NaN, unlike report.save
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert "Loss not measured" in Parsed(report_page.make(tmp_path).read_text()).text


def test_a_folder_without_a_report_and_wrong_usage(tmp_path, capsys):
    assert report_page.main([str(tmp_path)]) == 1
    assert "report.json is not there: give the folder" in capsys.readouterr().err
    assert report_page.main(["gs://bucket/pack"]) == 1
    assert "cannot write to gs://bucket/pack" in capsys.readouterr().err
    assert report_page.main([]) == report_page.main(["--help"]) == 2
    assert "usage: python -m qmoe_jax.report_page PACK" in capsys.readouterr().err


def browse(tmp_path, page, *options):
    """What a headless Chromium prints for a page; skips where there is no browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *fixed, "--hide-scrollbars", profile, *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "light"), (1280, "dark")])
def test_a_browser_shows_the_page(width, scheme, pack, tmp_path):
    picture = tmp_path / "page.png"
    size = f"--window-size={width},2400"
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(tmp_path, pack / "report.html", size, preferred, f"--screenshot={picture}")
    pixels = np.round(255 * matplotlib.image.imread(picture)[..., :3]).astype(np.uint8)
    assert pixels.shape == (2400, width, 3)
    assert tuple(pixels[0, 0]) == PAPER[scheme]
    # Content in each third of the height, and nothing of it cut off by the right edge.
    for third in np.split(pixels, 3):
        assert len(np.unique(third.reshape(-1, 3), axis=0)) > 20
    assert (pixels[:, -4:] == PAPER[scheme]).all()


def test_a_browser_reads_the_headline(pack, tmp_path):
    shown = browse(tmp_path, pack / "report.html", "--dump-dom")
    assert "legacy/<wbr>checkpoint_500100</h1>" in shown
    assert Parsed(shown).text == Parsed((pack / "report.html").read_text()).text
