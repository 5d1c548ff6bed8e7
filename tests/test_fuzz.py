# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints are read or refused with one of our own errors; see `fuzzing`.

`make fuzz` runs thousands of examples; one is repeated by
`QMOE_FUZZ_FIRST=example QMOE_FUZZ_EXAMPLES=1 pytest tests/test_fuzz.py -k target`.
"""

import os

import fuzzing
import pytest

FIRST = int(os.environ.get("QMOE_FUZZ_FIRST", "0"))
EXAMPLES = int(os.environ.get("QMOE_FUZZ_EXAMPLES", "40"))


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_damaged_checkpoints_are_read_or_refused(name, tmp_path):
    target = fuzzing.TARGETS[name]
    folder = tmp_path / "checkpoint"
    target.make(folder)
    target.read(folder)  # as made, it is sound
    refused = [
        fuzzing.check(target, folder, f"{name} {example}")
        for example in range(FIRST, FIRST + EXAMPLES)
    ]
    target.read(folder)  # and again, so that no example saw another's damage
    if EXAMPLES >= 40:
        assert sum(refused) > EXAMPLES / 8  # the changes are felt
