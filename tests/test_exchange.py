# SPDX-License-Identifier: Apache-2.0
"""Rounds of bounded size; what travels between real processes is in test_processes.py."""

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.calibration import exchange


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64])
@pytest.mark.parametrize("round_bytes", [1, 64, 1 << 20])
def test_rows_go_and_come_back_whatever_the_rounds_are(dtype, round_bytes, monkeypatch):
    monkeypatch.setattr(exchange, "ROUND_BYTES", round_bytes)
    values = np.random.default_rng(0).integers(-99, 99, (13, 3)).astype(dtype)
    values[2] = np.asarray(np.nan if dtype != np.int64 else -(2**62), dtype)  # bits are kept
    destination = np.asarray([0, 1] * 6 + [0])  # 1: there is no such process
    trip = exchange.plan(exchange.process_mesh(), destination)
    there = exchange.send(trip, values)
    assert there.tobytes() == values[::2].tobytes()
    back = values.copy()
    exchange.send_back(trip, there[:, ::-1].copy(), back)
    assert back[::2].tobytes() == values[::2, ::-1].tobytes()
    assert back[1::2].tobytes() == values[1::2].tobytes()


def test_nothing_to_send():
    trip = exchange.plan(exchange.process_mesh(), np.ones(5, np.int64))
    assert exchange.send(trip, np.zeros((5, 2), np.float32)).shape == (0, 2)


def test_rounds_are_bounded_and_alike(monkeypatch):
    monkeypatch.setattr(exchange, "ROUND_BYTES", 4096)
    counts = np.asarray([[0, 100], [7, 3]])
    rounds = list(exchange._rounds(counts, width=64))
    assert rounds == [(0, 32), (32, 32), (64, 32), (96, 32)]  # 2 x 32 x 64 bytes
    assert list(exchange._rounds(counts, width=8)) == [(0, 128)]
