# SPDX-License-Identifier: Apache-2.0
"""What `report.html` tells of layers and experts."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from qmoe_jax.report_page import markup
from qmoe_jax.report_page import plots as drawings
from qmoe_jax.report_page.markup import number

Layers: TypeAlias = Sequence[Mapping[str, Any]]  # of the parsed report.json

EXPERT_ROWS = 64  # shown of a layer
FALLBACK_ROWS, FALLBACK_EXPERTS = 100, 32  # shown, and experts named in one

ERROR_NOTE = (
    "The share of an expert's output energy that is wrong, on its own calibration tokens; without "
    "calibration, that of its weights. Dot: the median expert. Line: from the best to the worst."
)
TOKENS_NOTE = (
    "Calibration tokens routed to each expert, the busiest on the left. Shade: how many times the "
    "layer's mean. Outlined: no token at all."
)


def plots(layers: Layers) -> str:
    """Zeros, bits and errors over the layers, and the tokens of their experts, as HTML."""
    if not layers:
        return "<p>The report has no layers.</p>"
    places = [(str(layer["stack"]), int(layer["layer"])) for layer in layers]
    zeros, bits, errors = {}, {}, {}
    names = _matrix_names(layers)
    for name in names:
        found = [layer["matrices"].get(name) for layer in layers]
        zeros[name] = [m and (100 * m["zeros"] / m["weights"],) * 3 for m in found]
        bits[name] = [m and (m["bits"] / m["weights"],) * 3 for m in found]
        errors[name] = [m and _range(m["error"]) for m in found]
    zeros = drawings.by_layer("Zeros of each layer, per cent", places, zeros, unit="%")
    bits = drawings.by_layer("Stored bits per weight of each layer", places, bits)
    height = max(drawings.HEIGHT, drawings.loads_height(len(layers)))
    errors = drawings.by_layer(
        "Relative error of the experts of each layer", places, errors, height=height
    )
    return markup.pair(
        markup.figure("Zeros", zeros, "Share of the weights that are zero.", names),
        markup.figure("Bits per weight", bits, "As stored, everything counted.", names),
    ) + markup.pair(
        markup.figure("Relative error", errors, ERROR_NOTE, names)
        if errors
        else markup.figure("Relative error", "", "Not measured."),
        _loads(places, [layer["tokens"] for layer in layers]),
    )


def _loads(places: Sequence[drawings.Layer], tokens: Sequence[Sequence[int]]) -> str:
    title = "Tokens per expert"
    if not any(any(counts) for counts in tokens):
        return markup.figure(title, "", "None: nothing was calibrated.")
    drawn = drawings.loads("Calibration tokens of each layer's experts", places, tokens)
    return markup.figure(title, drawn, TOKENS_NOTE)


def layers_table(layers: Layers) -> str:
    """A row a layer, as HTML."""
    names = _matrix_names(layers)
    errors = [f"error {name}" for name in names]
    tokens = ("tokens, least", "median", "most")
    head = ("", "zeros", "bits / weight", *errors, *tokens, "fallbacks", "seconds")
    return markup.table(head, [_layer_row(layer, names) for layer in layers])


def _layer_row(layer: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    matrices, tokens = layer["matrices"], layer["tokens"]
    weights, zeros, bits = (
        sum(matrix[key] for matrix in matrices.values()) for key in ("weights", "zeros", "bits")
    )
    ranges = [_range(matrices[name]["error"]) if name in matrices else None for name in names]
    spread = _range(tokens) or (None, None, None)
    return [
        f"{layer['stack']} {layer['layer']}",
        f"{zeros / weights:.1%}",
        f"{bits / weights:.3f}",
        *(number(found and found[1], ".4f") for found in ranges),
        *(number(count, ",.0f") for count in spread),
        f"{len(layer['fallbacks']):,}",
        f"{layer['seconds']:,.1f}",
    ]


def experts(layers: Layers) -> str:
    """For each layer a folded table of its experts, or of those of the largest error, as HTML."""
    return f'<div class="folded">{"".join(_layer_experts(layer) for layer in layers)}</div>'


def _layer_experts(layer: Mapping[str, Any]) -> str:
    errors = {name: matrix["error"] for name, matrix in layer["matrices"].items()}
    columns = [layer["tokens"], layer["hessian_tokens"], *errors.values()]
    formats = [",", ",", *(".4f" for _ in errors)]
    count = max(map(len, columns))
    shown, note = list(range(count)), ""
    if count > EXPERT_ROWS:
        shown.sort(key=lambda expert: -max(_at(e, expert) or 0 for e in errors.values()))
        del shown[EXPERT_ROWS:]
        note = (
            f'<p class="note">The {EXPERT_ROWS} experts of the largest error; the other '
            f"{count - EXPERT_ROWS:,} are in <code>report.json</code>.</p>"
        )
    rows = [
        (
            expert,
            *(
                number(_at(found, expert), spec)
                for found, spec in zip(columns, formats, strict=True)
            ),
            layer["fallbacks"].get(str(expert), ""),
        )
        for expert in shown
    ]
    head = ("expert", "tokens", "in Hessians", *(f"error {name}" for name in errors), "fallback")
    if not layer["fallbacks"]:
        head, rows = head[:-1], [row[:-1] for row in rows]
    place = markup.text(f"{layer['stack']} {layer['layer']}")
    return (
        f"<details><summary>{place}<span>{count:,} experts</span></summary>\n"
        f"{markup.table(head, rows)}{note}</details>\n"
    )


def fallbacks(layers: Layers) -> str:
    """Which experts were rounded to nearest, and why, as HTML."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        for expert, why in layer["fallbacks"].items():
            grouped.setdefault((f"{layer['stack']} {layer['layer']}", str(why)), []).append(expert)
    if not grouped:
        return "<p>None.</p>"
    rows = []
    for (where, why), found in list(grouped.items())[:FALLBACK_ROWS]:
        left = len(found) - FALLBACK_EXPERTS
        more = f" and {left:,} more in report.json" if left > 0 else ""
        rows.append((where, why, f"{len(found):,}", ", ".join(found[:FALLBACK_EXPERTS]) + more))
    left = len(grouped) - len(rows)
    more = f'<p class="note">{left:,} more rows are in report.json.</p>' if left > 0 else ""
    return markup.table(("", "reason", "experts", "which"), rows, "words") + more


def _matrix_names(layers: Layers) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer["matrices"]))


def _range(values: Iterable[drawings.Number | None]) -> drawings.Range | None:
    found = [value for value in values if value is not None]
    return (min(found), statistics.median(found), max(found)) if found else None


def _at(values: Sequence[drawings.Number | None], place: int) -> drawings.Number | None:
    return values[place] if place < len(values) else None
