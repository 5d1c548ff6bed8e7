# SPDX-License-Identifier: Apache-2.0
"""`report.html`: what stands in `report.json`, as one page that needs no other file and no network.

    python -m qmoe_jax.report_page PACK

makes it anew from the `report.json` of a packed checkpoint.
"""

import dataclasses
import importlib.resources
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from qmoe_jax import report as reports
from qmoe_jax.checkpoints import array_files
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.report import Report, bytes_text
from qmoe_jax.report_page import layers as layer_sections
from qmoe_jax.report_page import markup, plots, run
from qmoe_jax.report_page.markup import text
from qmoe_jax.report_page.plots import Bar

JSON_NAME, HTML_NAME = "report.json", "report.html"
NO_RECORD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)  # of `page`
METHODS = {"gptq": "GPTQ", "rtn": "round to nearest"}


def save(report: Report, folder: pathlib.Path) -> None:
    """Writes both, `report.json` and `report.html`.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    reports.save(report, folder / JSON_NAME)
    # As JSON gives it back: what is not finite is None.
    record = json.loads(reports.to_json(dataclasses.asdict(report)))
    array_files.write_text(folder / HTML_NAME, page(record))


def make(folder: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` from the `report.json` beside it, and returns its path.

    Raises:
      CheckpointError: there is no report, it is damaged, or the page cannot be written.
    """
    path = folder / JSON_NAME
    try:
        made = page(json.loads(path.read_bytes(), parse_constant=_none))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is not there: give the folder of a checkpoint that `compress` packed."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except (*NO_RECORD, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged, or no report of a compression ({error!r}): restore it from a copy "
            "or compress again."
        ) from error
    array_files.write_text(folder / HTML_NAME, made)
    return folder / HTML_NAME


def _none(_: str) -> None:
    """For NaN and infinity."""


def page(record: Mapping[str, Any]) -> str:
    """The page of a parsed `report.json`; the same record gives the same text.

    Raises:
      One of NO_RECORD: it is no such record.
    """
    section, layers = markup.section, record["layers"]
    sections = (
        section("Cost and size", markup.pair(_losses(record), _sizes(record["totals"]))),
        section("Layers", layer_sections.plots(layers), layer_sections.layers_table(layers)),
        section("Experts", layer_sections.experts(layers)),
        section("Fallbacks to round-to-nearest", layer_sections.fallbacks(layers)),
        section("Use it", run.use(record)),
        section("Run", markup.pair(run.time(record["seconds"]), run.given(record))),
        section("Settings", run.settings(record["settings"])),
    )
    name = _name(str(record["checkpoint"]["path"]))
    style = (
        importlib.resources.files("qmoe_jax.report_page").joinpath("page.css").read_text("utf-8")
    )
    made = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Whatever a path or a setting holds: nothing is run, nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(name)}: compression report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{_headline(record, name)}\n{_figures(record)}\n"
        + "\n".join(sections)
        + "\n<footer><p>Made from <code>report.json</code>, which holds all of this and more. "
        "<code>python -m qmoe_jax.report_page PACK</code> makes it anew.</p></footer>\n"
        "</main>\n</body>\n</html>\n"
    )
    return made.encode("utf-8", "replace").decode()  # a path may be no text: b"\xff" on a disk


def _name(path: str) -> str:
    """What a reader calls the checkpoint: its folder, and the one above if it is that of a step."""
    parts = [part for part in re.split(r"[/\\]", path) if part]
    step = len(parts) > 1 and re.fullmatch(r"checkpoint_\d+", parts[-1])
    return "/".join(parts[-2:] if step else parts[-1:]) or path


def _headline(record: Mapping[str, Any], name: str) -> str:
    source, settings = record["checkpoint"], record["settings"]
    method, bits = (settings["quantizer"][key] for key in ("method", "bits"))
    spoken = f"{METHODS.get(method, method)}, {bits if bits == 'ternary' else f'{bits} bits'}"
    step = "" if source["step"] is None else f", step {source['step']}"
    facts = (
        f"{source['parameters']:,} parameters · {source['sparse_layers']:,} sparse layers of "
        f"{source['experts']:,} experts · {bytes_text(source['bytes'])} in {source['format']}{step}"
    )
    return (
        '<header><p class="eyebrow">Compression report · qmoe_jax</p>'
        f"<h1>{text(name).replace('/', '/<wbr>')}</h1>"
        f'<p class="method">{text(spoken)}, codec {text(settings["codec"])}</p>'
        f'<p>{text(facts)}</p><p class="path">{text(source["path"])}</p></header>'
    )


def _figures(record: Mapping[str, Any]) -> str:
    """The four numbers that a reader comes for."""
    found = record["totals"]
    bits = f"{found['bits_per_expert_weight']:.3f}"
    least = f"entropy {found['entropy_per_expert_weight']:.3f}; {found['zero_fraction']:.1%} zeros"
    before, after = bytes_text(2 * found["expert_weights"]), bytes_text(found["expert_bytes"])
    whole, packed = bytes_text(found["bfloat16_bytes"]), bytes_text(found["packed_bytes"])
    cards = (
        ("Experts, vs bfloat16", f"{found['expert_compression']:.2f}×", f"{before} → {after}"),
        ("Whole model, vs bfloat16", f"{found['compression']:.2f}×", f"{whole} → {packed}"),
        ("Bits per expert weight", bits, least),
        ("Loss", *_loss_figure(record)),
    )
    drawn = (
        f'<div><h2>{title}</h2><p class="big">{text(value)}</p><p>{text(note)}</p></div>'
        for title, value, note in cards
    )
    return f'<div class="figures">{"".join(drawn)}</div>'


def _loss_figure(record: Mapping[str, Any]) -> tuple[str, str]:
    difference, sign, error = _difference(record, "compressed").partition(" ± ")
    if not difference:
        missing = "a loss is missing or not finite" if record["losses"] else "no validation samples"
        return "not measured", missing
    note = f"{sign.lstrip()}{error} nats per token, from {record['losses']['original']:.4f}"
    nearest = _difference(record, "round_to_nearest")
    return difference, note + (f"; round to nearest {nearest}" if nearest else "")


def _difference(record: Mapping[str, Any], version: str) -> str:
    """How far a loss is from the original's; nothing if either is missing."""
    original, loss = (record["losses"].get(name) for name in ("original", version))
    if original is None or loss is None:
        return ""
    error = record.get("standard_errors", {}).get(version)
    return f"{loss - original:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _losses(record: Mapping[str, Any]) -> str:
    title = "Masked-span loss"
    losses = {name: loss for name, loss in record["losses"].items() if loss is not None}
    if not losses:
        return markup.figure(title, "", "Not measured.")
    error = record.get("standard_errors", {}).get("original")
    rows = []
    for name, loss in losses.items():
        if name == "original":
            note = f"{loss:.4f}" + ("" if error is None else f" ± {error:.4f}")
        else:
            difference = _difference(record, name)
            note = f"{loss:.4f}" + (f" ({difference})" if difference else "")
        rows.append(Bar(name.replace("_", " "), loss, note, losses.get("original", loss)))
    said = "; ".join(f"{row.name} {row.note}" for row in rows)
    return markup.figure(
        title,
        plots.bars(f"Loss, nats per token: {said}", rows),
        "Nats per target token; pale up to the original's. ± is one standard error over samples: "
        "of the original's loss, and of the others' difference from it.",
    )


def _sizes(found: Mapping[str, Any]) -> str:
    rows = (
        (
            "in bfloat16",
            bytes_text(2 * found["expert_weights"]),
            bytes_text(found["bfloat16_bytes"]),
        ),
        ("compressed", bytes_text(found["expert_bytes"]), bytes_text(found["packed_bytes"])),
        ("rate", f"{found['expert_compression']:.2f}×", f"{found['compression']:.2f}×"),
        (
            "bits per weight",
            f"{found['bits_per_expert_weight']:.3f}",
            f"{found['bits_per_parameter']:.3f}",
        ),
    )
    note = (
        f"{found['expert_weights']:,} of {found['parameters']:,} parameters are the experts'. "
        "Everything stored counts: codes, row lengths, and each row's values or scales."
    )
    return markup.figure("Size", markup.table(("", "experts", "whole model"), rows), note)


def main(arguments: list[str]) -> int:
    """The command line; a mistake ends in one line on standard error and exit code 1."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m qmoe_jax.report_page PACK", file=sys.stderr)
        return 2
    try:
        print(make(array_files.local_folder(arguments[0])))
    except CheckpointError as error:
        print(f"report_page: error: {error}", file=sys.stderr)
        return 1
    return 0
