# SPDX-License-Identifier: Apache-2.0
import logging

import pytest

from qmoe_jax.checkpoints import orbax_logging


def test_orbax_is_silent_for_a_while():
    log = logging.getLogger("absl")
    with pytest.raises(ValueError), orbax_logging.silenced():
        assert log.disabled
        raise ValueError
    assert not log.disabled
