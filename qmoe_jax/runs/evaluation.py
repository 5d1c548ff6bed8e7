# SPDX-License-Identifier: Apache-2.0
"""The losses of an evaluation, by corpus and model: as a record and as a table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.table
import rich.text

from qmoe_jax.calibration import data
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.calibration.walk import SampleLosses

ALL = "all"  # the table's row of all corpora together


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The samples of one corpus, and their losses by model; the first model is compared with."""

    samples: SampleSet
    losses: Mapping[str, SampleLosses]

    @property
    def differences(self) -> dict[str, SampleLosses]:
        """Of all models but the first, from the first."""
        first, *others = self.losses
        return {name: self.losses[name].minus(self.losses[first]) for name in others}


def mean(parts: Sequence[SampleLosses]) -> float:
    """Nats per target token of several corpora: a corpus weighs as many targets as it has."""
    totals = np.concatenate([part.total for part in parts])
    return SampleLosses(totals, np.concatenate([part.targets for part in parts])).mean


def standard_error(parts: Sequence[SampleLosses]) -> float:
    """Of `mean`, over other samples from the same corpora.

    Each corpus is a stratum: how far corpora lie apart is no uncertainty of their mean.
    """
    if len(parts) == 1:
        return parts[0].standard_error
    together = mean(parts)
    residuals = [part.total - together * part.targets for part in parts]
    square = sum(float(np.sum((own - own.mean()) ** 2)) for own in residuals)
    return float(np.sqrt(square)) / sum(int(part.targets.sum()) for part in parts)


def record(corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """Samples, targets, losses and differences of all corpora together, and of each."""
    all_samples = data.stack_samples([s for own in corpora.values() for s in own.samples])
    return _numbers(all_samples, list(corpora.values())) | {
        "corpora": {name: _numbers(own.samples, [own]) for name, own in corpora.items()}
    }


def table(corpora: Mapping[str, Corpus]) -> rich.table.Table:
    """A row for each corpus and, of several, one for all; a difference stands below its loss."""
    first, *others = next(iter(corpora.values())).losses
    columns = [first + "\n" * bool(others), *(f"{name}\n- {first}" for name in others)]
    result = rich.table.Table(
        "", *columns, title="Masked-span loss (nats per token)", show_lines=bool(others)
    )
    rows = {name: [own] for name, own in corpora.items()}
    if len(corpora) > 1:
        rows[ALL] = list(corpora.values())
    for name, parts in rows.items():
        cells = [_shown([part.losses[first] for part in parts])]
        for other in others:
            loss = _shown([part.losses[other] for part in parts])
            cells.append(f"{loss}\n{_shown([part.differences[other] for part in parts], '+')}")
        result.add_row(rich.text.Text(name), *cells)
    return result


def _numbers(samples: SampleSet, parts: Sequence[Corpus]) -> dict[str, Any]:
    losses = {name: [part.losses[name] for part in parts] for name in parts[0].losses}
    differences = {
        name: [part.differences[name] for part in parts] for name in parts[0].differences
    }
    return {
        "samples": len(samples),
        "targets": int(samples.decoder_offsets[-1]),
        "fingerprint": data.fingerprint(samples),
        "losses": _estimates(losses, "loss"),
        "differences": _estimates(differences, "difference"),
    }


def _estimates(parts: Mapping[str, Sequence[SampleLosses]], key: str) -> dict[str, Any]:
    return {
        name: {key: mean(found), "standard_error": standard_error(found)}
        for name, found in parts.items()
    }


def _shown(parts: Sequence[SampleLosses], sign: str = "") -> str:
    return f"{mean(parts):{sign}.4f} ± {standard_error(parts):.4f}"
