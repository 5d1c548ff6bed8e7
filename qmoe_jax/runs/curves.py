# SPDX-License-Identifier: Apache-2.0
"""The loss curve of a training, as JSON and as a picture."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from qmoe_jax.checkpoints import array_files
from qmoe_jax.checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    import matplotlib.figure

Series: TypeAlias = list[int | float]

JSON_NAME, PNG_NAME = "loss_curve.json", "loss_curve.png"
SECONDS, TOKENS = "elapsed_seconds", "tokens_seen"


@dataclasses.dataclass(frozen=True)
class Curve:
    """What was measured so far; the lists grow as the run goes on.

    `series` has `steps` and, of the same length, each metric's mean since the point before, and
    `elapsed_seconds` (of training: validation and saving are left out) and `tokens_seen` since the
    first step. `validation` has `steps` and `loss`.
    """

    series: dict[str, Series]
    validation: dict[str, Series]


def empty() -> Curve:
    """A curve without points."""
    return Curve({"steps": []}, {"steps": [], "loss": []})


def add(
    curve: Curve,
    step: int,
    metrics: Sequence[Mapping[str, int | float]],
    seconds: int | float,
    tokens: int,
) -> None:
    """Adds a point: the metrics' means over the steps since the last one, and what those took."""
    means = {name: sum(one[name] for one in metrics) / len(metrics) for name in metrics[0]}
    totals = {SECONDS: total(curve, SECONDS) + seconds, TOKENS: total(curve, TOKENS) + tokens}
    for name, value in {"steps": step, **means, **totals}.items():
        curve.series.setdefault(name, []).append(value)


def add_validation(curve: Curve, step: int, loss: float) -> None:
    """Adds a validation loss, nats per target token."""
    curve.validation["steps"].append(step)
    curve.validation["loss"].append(loss)


def total(curve: Curve, name: str) -> int | float:
    """`elapsed_seconds` or `tokens_seen` at the last point."""
    return curve.series[name][-1] if curve.series["steps"] else 0


def load(folder: pathlib.Path, last_step: int) -> Curve:
    """The curve in `folder` up to a step; empty where there is none.

    Raises:
      CheckpointError: the file is damaged.
    """
    path = folder / JSON_NAME
    if not path.exists():
        return empty()
    try:
        saved = json.loads(path.read_bytes())
        series = {name: values for name, values in saved.items() if isinstance(values, list)}
        return Curve(_until(series, last_step), _until(saved["validation"], last_step))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}): remove it, and the curve begins anew."
        ) from error


def _until(series: Mapping[str, Series], last_step: int) -> dict[str, Series]:
    kept = sum(step <= last_step for step in series["steps"])
    return {name: list(values[:kept]) for name, values in series.items()}


def save(folder: pathlib.Path, curve: Curve, settings: Mapping[str, Any], device: str) -> None:
    """Replaces both files in `folder`.

    Raises:
      CheckpointError: they cannot be written.
    """
    content = {
        **curve.series,
        "validation": curve.validation,
        "seconds": total(curve, SECONDS),
        "tokens": total(curve, TOKENS),
        "device": device,
        "settings": dict(settings),
    }
    array_files.write_text(folder / JSON_NAME, json.dumps(content, indent=1))
    with array_files.replacing(folder / PNG_NAME) as handle:
        picture(curve).savefig(handle, format="png", dpi=120)


def picture(curve: Curve) -> "matplotlib.figure.Figure":
    """Cross entropy in training and validation, and below it how the experts are balanced."""
    import matplotlib.figure  # a fifth of the time that every command takes to start

    figure = matplotlib.figure.Figure(figsize=(7, 6), layout="constrained")
    loss, balance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = curve.series["steps"]
    loss.plot(steps, curve.series.get("cross_entropy", []), label="training", linewidth=1)
    if curve.validation["steps"]:
        loss.plot(*curve.validation.values(), "o-", label="validation", markersize=3)
    loss.set_ylabel("cross entropy, nats per target")
    loss.legend()
    balance.plot(steps, curve.series.get("auxiliary_loss", []), color="tab:gray", linewidth=1)
    balance.set_ylabel("load balance loss\n(1: balanced)")
    balance.set_xlabel("step")
    for axes in (loss, balance):
        axes.grid(alpha=0.3)
    return figure
