# SPDX-License-Identifier: Apache-2.0
from qmoe_jax.checkpoints.errors import CheckpointError


def test_long_messages_lose_their_middle():
    assert str(CheckpointError("short")) == "short"
    shown = str(CheckpointError("first" + 9000 * "x" + "last"))
    assert len(shown) < 2000
    assert shown.startswith("first") and shown.endswith("last")
