# SPDX-License-Identifier: Apache-2.0
"""Text with gaps, as span corruption makes it, and what a model fills them with."""

from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

from qmoe_jax.calibration.tokenizer import PAD_ID, Tokenizer


def split(tokens: Iterable[SupportsIndex], vocabulary: Tokenizer) -> dict[int, list[int]]:
    """The tokens after each sentinel, by its number: 0 for `<extra_id_0>`; up to EOS.

    What stands before the first sentinel, and a sentinel's second occurrence, is left out.
    """
    found: dict[int, list[int]] = {}
    current: list[int] = []
    for token in map(int, tokens):
        if token in (vocabulary.eos_id, PAD_ID):
            break
        number = vocabulary.first_sentinel_id - token
        if 0 <= number < vocabulary.num_sentinels:
            current = []
            found.setdefault(number, current)
        else:
            current.append(token)
    return found


def filled(
    encoder_input_tokens: Int32[np.ndarray, " S"],
    target_tokens: Int32[np.ndarray, " L"],
    vocabulary: Tokenizer,
) -> str:
    """The text of a sample, its gaps filled from `target_tokens` and put in brackets.

    A gap that the targets say nothing of shows as `[...]`.
    """
    fillings = split(target_tokens, vocabulary)
    parts: list[str] = []
    kept: list[int] = []
    for token in map(int, encoder_input_tokens):
        number = vocabulary.first_sentinel_id - token
        if token in (vocabulary.eos_id, PAD_ID):
            break
        if 0 <= number < vocabulary.num_sentinels:
            filling = vocabulary.decode(fillings[number]) if number in fillings else "..."
            parts += [vocabulary.decode(kept), f"[{filling}]"]
            kept = []
        else:
            kept.append(token)
    return " ".join(part for part in (*parts, vocabulary.decode(kept)) if part)
