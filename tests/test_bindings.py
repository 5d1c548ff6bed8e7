# SPDX-License-Identifier: Apache-2.0
"""What is found in a config as gin prints it, suggestions, and types."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from qmoe_jax import bindings

CONFIG = """from qmoe_jax.runs import compress

# Macros:
# ===
BITS = 2
DOCUMENT = 'a %QUOTED it\\'s'
FILES = ["b's %QUOTED", %MORE, 'c %QUOTED']
LONG = \\
    '/a/long/%20path'
OUTPUT_DIR = %gin.REQUIRED

# Parameters for compress.compress:
# ===
compress.compress.codec = %gin.REQUIRED
compress.compress.output_dir = %OUTPUT_DIR
compress.compress.quantizer = @quantizer.Quantizer()
scope/quantizer.Quantizer.bits = %BITS
"""


def test_used_names_are_references_and_parameters():
    parameters = {"codec", "output_dir", "quantizer"}
    assert bindings.used_names(CONFIG) == {
        *("BITS", "MORE", "OUTPUT_DIR", "Quantizer.bits"),
        *(f"compress.{name}" for name in parameters),
    }


def test_missing_names_are_required_or_unset():
    assert bindings.missing_names(CONFIG) == ["MORE", "OUTPUT_DIR", "compress.compress.codec"]


KNOWN = {"NUM_SAMPLES", "SEED", "compress.num_samples", "Quantizer.bits"}


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("NUM_SAMPELS", "did you mean NUM_SAMPLES?"),
        ("num_samples", "did you mean NUM_SAMPLES?"),
        ("compres.num_samples", "did you mean compress.num_samples?"),
        ("FROBNICATE", "expected one of NUM_SAMPLES, SEED"),
        ("MIXTURE_OR_TASK_NAME", "give CALIBRATION_FILES=task:NAME"),
    ],
)
def test_remedy_names_what_was_meant(name, remedy):
    assert bindings.remedy(name, KNOWN).startswith(remedy)


@dataclasses.dataclass(frozen=True)
class Record:
    number: int = 0
    part: float = 0.0
    name: str | None = None
    names: Sequence[str] | str = ()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    free: Any = None


@dataclasses.dataclass(frozen=True)
class Macro:
    """Shows itself as gin's references do."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


def takes_records(record: Record, count: int = 0) -> Macro:
    """A function as run modes are; what it returns is not configured."""
    raise NotImplementedError


def test_records_are_found_among_parameters():
    assert list(bindings.records(takes_records)) == [Record]
    assert list(bindings.records(Record)) == []


@pytest.mark.parametrize(
    "values",
    [
        {"number": 3, "part": 1, "name": None, "names": ["a", "b"], "sizes": {"x": 1}},
        {"part": 0.5, "name": "x", "names": "a", "kind": "b", "flag": True, "free": object()},
        {"names": ("a",), "sizes": {}},
    ],
)
def test_values_that_fit(values):
    bindings.check_arguments(Record, values, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": "ten"}, "NUMBER is 'ten'; expected int"),
        ({"number": 1e4}, "NUMBER is 10000.0; expected int"),
        ({"number": True}, "NUMBER is True; expected int"),
        ({"part": "0.1"}, "PART is '0.1'; expected float"),
        ({"name": 3}, "NAME is 3; expected str or None; quote it: --gin.NAME=\"'3'\""),
        ({"names": [3]}, "NAMES is [3]; expected Sequence[str] or str"),
        ({"sizes": {"x": "y"}}, "SIZES is {'x': 'y'}; expected Mapping[str, int]"),
        ({"sizes": 3}, "SIZES is 3; expected Mapping[str, int]"),
        ({"kind": "c"}, "KIND is 'c'; expected 'a' or 'b'"),
        ({"flag": "true"}, "FLAG is 'true'; expected True or False"),
    ],
)
def test_values_that_do_not_fit(values, message):
    (parameter,) = values
    with pytest.raises(ValueError) as caught:
        bindings.check_arguments(Record, {parameter: Macro(parameter.upper())}, values)
    assert str(caught.value) == message


def test_without_a_macro_the_parameter_is_named():
    values = {"record": Record(), "count": "x"}
    with pytest.raises(ValueError, match=r"^takes_records\.count is 'x'; expected int$"):
        bindings.check_arguments(takes_records, values, values)


def test_missing_arguments_are_named():
    message = "^takes_records is missing a required argument: 'record'$"
    with pytest.raises(ValueError, match=message):
        bindings.check_arguments(takes_records, {"count": 3}, {"count": 3})


def test_explanations_are_for_users():
    appended = ValueError("BITS is 5\n  In call to configurable 'Quantizer' (<class 'Quantizer'>)")
    assert bindings.explanation(appended) == "BITS is 5"
    unread = SyntaxError("malformed node <0x7f>", ("own.gin", 3, 1, "BITS = ternary\n"))
    expected = (
        "own.gin, line 3: cannot read `BITS = ternary`; expected NAME = VALUE, text in quotes"
    )
    assert bindings.explanation(unread) == expected
