# SPDX-License-Identifier: Apache-2.0
import io

import numpy as np
import pytest
import rich.console

from qmoe_jax.calibration import data
from qmoe_jax.calibration.data import Sample
from qmoe_jax.calibration.walk import SampleLosses
from qmoe_jax.runs import evaluation
from qmoe_jax.runs.evaluation import Corpus


def corpus(targets, **losses):
    tokens = [np.ones(number, np.int32) for number in targets]
    samples = data.stack_samples([Sample(own, own, own) for own in tokens])
    lengths = np.array(targets)
    return Corpus(
        samples,
        {name: SampleLosses(np.array(total, float), lengths) for name, total in losses.items()},
    )


CORPORA = {
    "easy": corpus([10, 10], original=[10, 12], packed=[11, 13]),  # 0.1 more for every target
    "[hard]": corpus([10, 30], original=[50, 150], packed=[50, 158]),
}


def test_all_corpora_are_weighed_by_their_targets_and_their_distance_is_no_error():
    found = evaluation.record(CORPORA)
    assert found["targets"] == 60 and found["samples"] == 4
    easy, hard = found["corpora"].values()
    assert easy["losses"]["original"]["loss"] == pytest.approx(1.1)
    assert hard["losses"]["original"] == {"loss": 5.0, "standard_error": 0.0}
    assert found["losses"]["original"]["loss"] == pytest.approx((22 + 200) / 60)
    assert found["differences"]["packed"]["difference"] == pytest.approx(10 / 60)
    assert easy["differences"]["packed"]["standard_error"] == pytest.approx(0, abs=1e-12)
    # Other samples of the same corpora: drawn anew many times, the mean spreads by so much.
    rng = np.random.default_rng(0)
    parts = [CORPORA[name].losses["packed"] for name in CORPORA]
    means = []
    for _ in range(4000):
        drawn = [rng.integers(0, 2, 2) for _ in parts]
        pairs = [(p.total[d].sum(), p.targets[d].sum()) for p, d in zip(parts, drawn, strict=True)]
        total, targets = np.sum(pairs, axis=0)
        means.append(total / targets)
    found_error = evaluation.standard_error(parts)
    assert found_error == pytest.approx(np.std(means), rel=0.2)
    together = SampleLosses(
        *(np.concatenate([getattr(p, f) for p in parts]) for f in ("total", "targets"))
    )
    assert found_error < together.standard_error / 2


def test_the_table_shows_a_difference_below_its_loss_and_no_row_for_all_of_one():
    def lines(corpora):
        out = io.StringIO()
        rich.console.Console(file=out, width=80).print(evaluation.table(corpora))
        return [
            line.strip("│┃").split("│" if "│" in line else "┃")
            for line in out.getvalue().splitlines()
        ]

    def cells(corpora):
        return [[cell.strip() for cell in line] for line in lines(corpora) if len(line) > 1]

    shown = cells(CORPORA)
    assert shown[:2] == [["", "original", "packed"], ["", "", "- original"]]
    place = next(i for i, row in enumerate(shown) if row[0] == "[hard]")
    assert shown[place][1:] == ["5.0000 ± 0.0000", "5.2000 ± 0.0707"]
    assert shown[place + 1] == ["", "", "+0.2000 ± 0.0707"]
    assert [row[0] for row in shown if row[0]] == ["easy", "[hard]", "all"]
    assert [row[0] for row in cells({"easy": CORPORA["easy"]}) if row[0]] == ["easy"]
