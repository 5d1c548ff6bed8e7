# SPDX-License-Identifier: Apache-2.0
"""Orbax's log, kept off the terminal."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps Orbax from logging, by the page, what it raises."""
    log = logging.getLogger("absl")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled
