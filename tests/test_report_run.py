# SPDX-License-Identifier: Apache-2.0
"""The command that the page gives."""

import pytest
import report_records

from qmoe_jax.report_page import run as report_run


@pytest.mark.parametrize(
    ("value", "spelt"),
    [
        ("/data/c4/*.json.gz", "'--gin.VALIDATION_FILES=/data/c4/*.json.gz'"),
        ("a b's.txt", """'--gin.VALIDATION_FILES="a b'"'"'s.txt"'"""),
        ("12", """'--gin.VALIDATION_FILES="12"'"""),
        (["a.txt", "b.txt"], """'--gin.VALIDATION_FILES=["a.txt", "b.txt"]'"""),
    ],
)
def test_settings_are_spelt_for_gin_and_the_shell(value, spelt):
    record = report_records.synthetic(sparse=1, experts=2)
    record["settings"]["text"]["validation_files"] = value
    assert spelt in report_run.eval_command(record)
