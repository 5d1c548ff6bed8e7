# SPDX-License-Identifier: Apache-2.0
"""The plots of `report.html`: inline SVG, which takes its colours from the page's style sheet."""

import dataclasses
import html
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Layer: TypeAlias = tuple[str, int]  # stack and number
Number: TypeAlias = int | float
Range: TypeAlias = tuple[Number, Number, Number]  # least, middle, greatest

WIDTH = 420  # of every plot; a phone shows it at about four fifths
HEIGHT = 210  # of `by_layer`, unless told
SINGLE_EXPERTS = 64  # up to here each expert has a cell of its own

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 6, 10, 38  # around the field of `by_layer`
_NAMES = 84  # left of the field of `loads`
_RATIOS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # between the shades of `loads`, in means
_SHADES = ("none", "&lt; ⅛", "⅛+", "¼+", "½+", "1+", "2+", "4+")  # HTML


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar from 0 to `value`; pale up to `base`."""

    name: str
    value: Number
    note: str
    base: Number = 0


def bars(label: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from 0, each below its name and note. `label` is for screen readers."""
    longest = max((bar.value for bar in rows), default=0.0)
    drawn = []
    for place, bar in enumerate(rows):
        y = 40 * place
        scale = WIDTH / longest if longest > 0 else 0.0
        whole, pale = scale * bar.value, scale * min(bar.base, bar.value)
        drawn.append(
            f'<text class="name" x="0" y="{y + 15}">{html.escape(bar.name)}</text>'
            f'<text class="end" x="{WIDTH}" y="{y + 15}">{html.escape(bar.note)}</text>'
            f'<rect class="ground" y="{y + 22}" width="{WIDTH}" height="8"/>'
            f'<rect class="mark" y="{y + 22}" width="{whole:.1f}" height="8"/>'
            f'<rect class="pale" y="{y + 22}" width="{pale:.1f}" height="8"/>'
        )
    return _svg(label, 40 * len(rows), drawn)


def by_layer(
    label: str,
    layers: Sequence[Layer],
    series: Mapping[str, Sequence[Range | None]],
    *,
    unit: str = "",
    height: int = HEIGHT,
) -> str:
    """Dots over the layers, the stacks side by side; where least and greatest differ, with a line.

    Args:
      label: for screen readers.
      layers: in order.
      series: name -> for each layer, or None where nothing was measured.
      unit: behind the numbers.
      height: of the plot.

    Returns:
      SVG; nothing if nothing was measured.
    """
    values = [value for found in series.values() for point in found if point for value in point]
    if not values:
        return ""
    ticks, digits = _ticks(min(values), max(values))
    xs, width = _columns(layers)

    def y_of(value: Number) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return height - _BOTTOM - share * (height - _BOTTOM - _TOP)

    drawn = []
    for tick in ticks:
        y = y_of(tick)
        drawn.append(
            f'<path class="rule" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
            f'<text class="end" x="{_LEFT - 7}" y="{y + 4:.1f}">{tick:.{digits}f}{unit}</text>'
        )
    drawn += _layer_names(layers, xs, width, height)
    for place, (name, points) in enumerate(series.items()):
        # Side by side, if they have ranges, which would hide each other.
        apart = min(7.0, width / (len(series) + 1)) if _has_ranges(points) else 0.0
        shift = (place - (len(series) - 1) / 2) * apart
        dots = [
            (layer, x + shift, point, (y_of(point[0]), y_of(point[1]), y_of(point[2])))
            for layer, x, point in zip(layers, xs, points, strict=True)
            if point is not None
        ]
        drawn.append(f'<g class="series k{min(place, 2)}">')
        drawn += _dots(name, dots, unit, radius=min(4.0, 1.5 + width / 8))
        drawn.append("</g>")
    return _svg(label, height, drawn)


def _dots(
    name: str, dots: Sequence[tuple[Layer, Number, Range, Range]], unit: str, radius: Number
) -> list[str]:
    """A thread through the dots of each stack, then the dots; their last field is a range of y."""
    drawn = []
    for _, stack in itertools.groupby(dots, key=lambda dot: dot[0][0]):
        path = "L".join(f"{x:.1f} {ys[1]:.1f}" for _, x, _, ys in stack)
        drawn.append(f'<path class="thread" d="M{path}"/>')
    for (stack, number), x, (low, middle, high), ys in dots:
        said = f"{stack} {number}, {name}: {middle:.4g}{unit}"
        if low != high:
            said += f" ({low:.4g} to {high:.4g})"
            drawn.append(f'<path class="range" d="M{x:.1f} {ys[0]:.1f}V{ys[2]:.1f}"/>')
        drawn.append(
            f'<circle cx="{x:.1f}" cy="{ys[1]:.1f}" r="{radius:.1f}">'
            f"<title>{html.escape(said)}</title></circle>"
        )
    return drawn


def loads(label: str, layers: Sequence[Layer], tokens: Sequence[Sequence[int]]) -> str:
    """A row a layer, its experts from the busiest to the idlest; darker is more tokens.

    Sorted, thousands of experts are a few runs of one shade: how uneven a layer is shows in their
    lengths, and the plot stays small. Few experts have a cell each.
    """
    row = _row_height(len(layers))
    drawn = []
    for place, ((stack, number), counts) in enumerate(zip(layers, tokens, strict=True)):
        drawn.append(
            f'<text class="end" x="{_NAMES - 8}" y="{(place + 0.5) * row + 4:.1f}">'
            f"{html.escape(stack)} {number}</text>"
        )
        drawn += _load_row(f"{stack} {number}", counts, place * row, row - 2)
    bottom = row * len(layers)
    step = (WIDTH - _NAMES) / len(_SHADES)
    for shade, said in enumerate(_SHADES):
        x = _NAMES + shade * step
        drawn.append(
            f'<rect class="load l{shade}" x="{x + 0.5:.1f}" y="{bottom + 14}" '
            f'width="{step - 2:.1f}" height="10"/>'
            f'<text class="middle" x="{x + step / 2:.1f}" y="{bottom + 39}">{said}</text>'
        )
    drawn.append(f'<text class="end" x="{_NAMES - 8}" y="{bottom + 39}">× mean</text>')
    return _svg(label, loads_height(len(layers)), drawn)


def loads_height(num_layers: int) -> int:
    """Of `loads`, for a plot beside it."""
    return _row_height(num_layers) * num_layers + 46


def _row_height(num_layers: int) -> int:
    return max(15, min(34, 200 // max(num_layers, 1)))


def _load_row(where: str, counts: Sequence[int], y: Number, height: Number) -> list[str]:
    mean = statistics.fmean(counts) if counts else 0.0
    ordered = sorted(enumerate(counts), key=lambda item: -item[1])
    cell = (WIDTH - _NAMES) / max(len(counts), 1)
    single = len(counts) <= SINGLE_EXPERTS
    drawn, x = [], float(_NAMES)
    for _, run in itertools.groupby(
        ordered, key=lambda item: item if single else _shade(item[1], mean)
    ):
        experts = list(run)
        shade = _shade(experts[0][1], mean)
        width = cell * len(experts)
        if single:
            said = f"expert {experts[0][0]}: {experts[0][1]:,} tokens"
        else:
            said = f"{len(experts):,} experts: {experts[-1][1]:,} to {experts[0][1]:,} tokens"
        drawn.append(
            f'<rect class="load l{shade}" x="{x:.2f}" y="{y:.1f}" '
            f'width="{max(width - 1, width / 2):.2f}" height="{height:.1f}">'
            f"<title>{html.escape(where)}, {said}</title></rect>"
        )
        x += width
    return drawn


def _shade(count: int, mean: Number) -> int:
    return 0 if count == 0 else 1 + sum(count >= ratio * mean for ratio in _RATIOS)


def _columns(layers: Sequence[Layer]) -> tuple[list[float], float]:
    """The middle of each layer's column, and a column's width; a free one between stacks."""
    slots, slot = [], 0
    for place, (stack, _) in enumerate(layers):
        slot += place > 0 and stack != layers[place - 1][0]
        slots.append(slot)
        slot += 1
    width = (WIDTH - _LEFT - _RIGHT) / slot
    return [_LEFT + (slot + 0.5) * width for slot in slots], width


def _layer_names(
    layers: Sequence[Layer], xs: Sequence[Number], width: Number, height: int
) -> list[str]:
    every = math.ceil(20 / width)  # a number takes about so much
    drawn = []
    columns = list(zip(layers, xs, strict=True))
    for stack, found in itertools.groupby(columns, key=lambda column: column[0][0]):
        group = list(found)
        for (_, number), x in group[::every]:
            drawn.append(
                f'<text class="middle" x="{x:.1f}" y="{height - _BOTTOM + 16}">{number}</text>'
            )
        middle = (group[0][1] + group[-1][1]) / 2
        drawn.append(
            f'<text class="middle name" x="{middle:.1f}" y="{height - 5}">'
            f"{html.escape(stack)}</text>"
        )
    return drawn


def _has_ranges(points: Sequence[Range | None]) -> bool:
    return any(point is not None and point[0] != point[2] for point in points)


def _ticks(low: Number, high: Number) -> tuple[list[float], int]:
    """Round numbers from below `low` to above `high`, and their digits after the point."""
    if high - low <= 1e-9 * abs(high):
        low, high = low - 0.05 * abs(low or 1), high + 0.05 * abs(high or 1)
    power = math.floor(math.log10((high - low) / 3))
    times = next(times for times in (1, 2, 5, 10) if (high - low) / (times * 10.0**power) <= 5)
    step = times * 10.0**power
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [step * number for number in range(first, last + 1)], max(0, -power - (times == 10))


def _svg(label: str, height: int, drawn: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(drawn)}</svg>'
    )
