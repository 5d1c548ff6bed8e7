# SPDX-License-Identifier: Apache-2.0
"""Settings of a quantization: the paper's by default, impossible ones refused by name."""

import dataclasses

import jaxtyping
import pytest

from qmoe_jax.quantization.gptq import GptqOptions
from qmoe_jax.quantization.quantizer import Quantizer


def test_the_defaults_are_the_papers():
    quantizer = Quantizer()
    assert (quantizer.method, quantizer.bits) == ("gptq", "ternary")
    assert quantizer.options == GptqOptions(damping=0.1, block_size=128)
    assert (quantizer.token_cap, quantizer.mask_special_tokens) == (4.0, True)
    assert not quantizer.true_sequential


@pytest.mark.parametrize(
    "given, meant", [("ternary", "ternary"), (1.5, "ternary"), (2, 2), (3.0, 3), (4, 4)]
)
def test_bits_are_named_one_way(given, meant):
    quantizer = Quantizer(bits=given)
    assert quantizer.bits == meant
    assert type(quantizer.bits) is type(meant)
    assert quantizer == Quantizer(bits=meant)
    assert dataclasses.asdict(quantizer)["bits"] == meant


def test_options_reach_the_solver():
    quantizer = Quantizer(bits=3, damping=0.01, block_size=64, group_size=32, activation_order=True)
    assert quantizer.options == GptqOptions(
        damping=0.01, block_size=64, group_size=32, activation_order=True
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "obq"}, "METHOD is 'obq'; expected 'gptq' or 'rtn'"),
        ({"method": "GPTQ"}, "METHOD is 'GPTQ'"),
        ({"method": None}, "METHOD is None"),
        ({"bits": 1}, r"BITS is 1; expected 'ternary' \(or 1.5\), 2, 3 or 4"),
        ({"bits": 5}, "BITS is 5"),
        ({"bits": 8}, "BITS is 8"),
        ({"bits": 2.5}, "BITS is 2.5"),
        ({"bits": "3"}, "BITS is '3'"),
        ({"bits": "Ternary"}, "BITS is 'Ternary'"),
        ({"method": "rtn", "group_size": 128}, "GROUP_SIZE is for METHOD 'gptq'"),
        ({"grid": "best"}, "GRID is 'best'; expected 'minmax' or 'least_squares'"),
        (
            {"grid": "least_squares", "bits": 2},
            "GRID 'least_squares' is for METHOD 'gptq' and BITS",
        ),
        ({"grid": "least_squares", "method": "rtn"}, "not for METHOD 'rtn'"),
        ({"grid": "least_squares", "bits": 1.5, "group_size": 128}, "leave GROUP_SIZE out"),
        ({"penalty": 0.1}, "LAMBDA 0.1 is for GRID 'least_squares'"),
        ({"grid": "least_squares", "bits": 1.5, "sweeps": -1}, "SWEEPS is -1; expected 0 or more"),
        ({"token_cap": 0}, "TOKEN_CAP is 0; expected more than 0"),
        ({"token_cap": -1.5}, "TOKEN_CAP is -1.5"),
        ({"damping": -0.1}, "DAMPING is -0.1; expected a number of 0 or more"),
        ({"block_size": 0}, "BLOCK_SIZE is 0; expected a positive multiple of 8"),
        ({"block_size": -128}, "block_size is -128"),
        ({"block_size": 100}, "block_size is 100"),
        ({"group_size": 0}, "group_size is 0; expected a divisor or a multiple of block_size 128"),
        ({"group_size": -64}, "group_size is -64"),
        ({"group_size": 96}, "group_size is 96"),
        ({"group_size": 200}, "group_size is 200"),
    ],
)
def test_impossible_settings_are_refused(changes, message, monkeypatch):
    """Also those that the run-time type checks of these tests would not let through."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    changes = {"method": "gptq", "bits": 3} | changes
    with pytest.raises(ValueError, match=f"(?i){message}"):
        Quantizer(**changes)
