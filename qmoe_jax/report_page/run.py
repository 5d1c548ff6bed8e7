# SPDX-License-Identifier: Apache-2.0
"""What `report.html` tells of a run: its time, machine, samples and settings, and what is next."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from qmoe_jax.report import bytes_text, main_seconds
from qmoe_jax.report_page import markup, plots
from qmoe_jax.report_page.plots import Bar

LIST_ITEMS = 20  # shown of a setting


def time(seconds: Mapping[str, int | float]) -> str:
    """Seconds by phase, as HTML."""
    total = max(main_seconds(seconds), 1e-9)
    rows = [
        Bar(phase, spent, f"{spent:,.1f} s · {spent / total:.0%}")
        for phase, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    if not rows:
        return markup.figure("Time by phase", "", "Not measured.")
    said = "; ".join(f"{row.name} {row.note}" for row in rows)
    drawn = plots.bars(f"Time by phase: {said}", rows)
    return markup.figure(
        "Time by phase",
        drawn,
        "Some phases go on beside the others; shares are of what the others take together.",
    )


def given(record: Mapping[str, Any]) -> str:
    """Machine and samples, as HTML."""
    machine = dict(record["machine"])
    peak = machine.pop("peak_host_bytes", None)
    overlap = machine.pop("overlap", {})
    rows = [(name.replace("_", " "), value) for name, value in machine.items() if value != []]
    if overlap:
        rows.append(
            ("device busy", f"{overlap['busy_fraction']:.0%} of {overlap['seconds']:,.1f} s")
        )
    if peak is not None:
        rows.append(("most host memory", bytes_text(peak)))
    drawn = markup.figure("Machine", markup.table((), rows, "words"))
    return f"<div>{drawn}{_samples(record['samples'])}</div>"


def _samples(samples: Mapping[str, Any]) -> str:
    if not samples:
        return markup.figure("Samples", "", "None.")
    columns = {}
    for name, found in samples.items():
        numbers = {**found, **found.get("counts", {})}
        columns[name] = {
            key: f"{value:,}" for key, value in numbers.items() if isinstance(value, int)
        }
        columns[name]["fingerprint"] = f"{found.get('fingerprint', ''):.10}…"
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [
        (key.replace("_", " "), *(column.get(key, "–") for column in columns.values()))
        for key in keys
    ]
    return markup.figure("Samples", markup.table(("", *columns), rows))


LOADING = """import qmoe_jax

model = qmoe_jax.load("PACK")
print(model.fill("The <extra_id_0> of a list.", length=16))"""


def use(record: Mapping[str, Any]) -> str:
    """How the pack is loaded and evaluated, as HTML."""
    shown = "<p>PACK is the folder that this page lies in.</p>" + markup.code(LOADING)
    if record["settings"]["text"]:  # samples may have come from elsewhere
        command = " \\\n  ".join(eval_command(record))
        shown += "<p>Its loss on the same text:</p>" + markup.code(command)
    return shown


def eval_command(record: Mapping[str, Any]) -> list[str]:
    """The words, quoted for a shell, of the `eval` that measures the reported loss once more."""
    given, samples = record["settings"]["text"], record["samples"]
    settings = {
        "CHECKPOINT_PATH": "PACK",
        "SENTENCEPIECE_MODEL_FILE": given["sentencepiece_model_file"],
        "VALIDATION_FILES": given["validation_files"],
        "EVAL_OUTPUT_DIR": None,
    }
    if given["validation_files"] is None:  # samples held back from this
        settings["CALIBRATION_FILES"] = given["files"]
        if "calibration" in samples:
            settings["NUM_SAMPLES"] = samples["calibration"]["samples"]
    if "validation" in samples:
        settings["NUM_VALIDATION_SAMPLES"] = samples["validation"]["samples"]
    for name in ("extra_ids", "task_feature_lengths", "document_mode", "seed"):
        if given.get(name) is not None:
            settings[name.upper()] = given[name]
    return ["qmoe-jax --run_mode=eval"] + [
        shlex.quote(f"--gin.{name}={_spelling(value)}") for name, value in settings.items()
    ]


def _spelling(value: Any) -> str:
    """A value as `--gin.NAME=` takes it; text that cannot be mistaken needs no quotes."""
    if not isinstance(value, str | list | dict):
        return repr(value)
    if isinstance(value, str) and re.fullmatch(r"(?!(None|True|False)$)[A-Za-z/][\w./*:-]*", value):
        return value
    return json.dumps(value, ensure_ascii=False)  # double quotes, which shells leave readable


def settings(used: Mapping[str, Any]) -> str:
    """All settings as used, as HTML."""
    groups = {"storage": {k: v for k, v in used.items() if not isinstance(v, dict)}}
    groups |= {name: group for name, group in used.items() if isinstance(group, dict)}
    return markup.pair(
        *(
            markup.figure(
                name.capitalize(),
                markup.table(
                    (),
                    [(key.replace("_", " "), _shown(value)) for key, value in group.items()],
                    "words",
                ),
            )
            for name, group in sorted(groups.items())
        )
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        left = len(value) - LIST_ITEMS
        more = [f"and {left:,} more in report.json"] if left > 0 else []
        return ", ".join([str(item) for item in value[:LIST_ITEMS]] + more)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
