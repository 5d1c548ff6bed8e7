# SPDX-License-Identifier: Apache-2.0
"""Beam search with the scores and defaults of T5X's `decoding.beam_search`."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from qmoe_jax.inference import decoding
from qmoe_jax.inference.model import Model
from qmoe_jax.models.switch import DecoderCache, Switch

NO_BEAM = -1e7  # the score of a place that holds no sequence


@dataclasses.dataclass(frozen=True)
class Beams:
    """How wide is searched, by T5X's names.

    Attributes:
      num_decodes: sequences kept at each position, and returned.
      alpha: a finished sequence's log probability is divided by ((5 + length) / 6) ** alpha (Wu et
        al. 2016, eq. 14); 0 favours short answers, 1 long ones.
    """

    num_decodes: int = 4
    alpha: float = 0.6

    def __post_init__(self):
        if operator.index(self.num_decodes) < 1 or not 0 <= self.alpha < math.inf:
            raise ValueError(
                f"num_decodes {self.num_decodes}, alpha {self.alpha}: expected at least one beam, "
                "and an alpha that is finite and not negative"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """A batch as far as it is searched; K beams for each of B rows."""

    live: Int32[Array, "B K L"]
    live_log_prob: Float[Array, "B K"]
    finished: Int32[Array, "B K L"]  # these have said EOS
    finished_score: Float[Array, "B K"]
    position: Int32[Array, ""]
    cache: DecoderCache  # of B rows what the encoder gave, of B * K live ones the rest


def beam_search(
    model: Model,
    encoder_input_tokens: Int[np.ndarray, "B S"],
    length: int,
    *,
    beams: Beams = Beams(),
    eos_id: int = 1,
) -> tuple[Int32[np.ndarray, "B K L"], Float[np.ndarray, "B K"]]:
    """Searches for the sequences with the best scores; the whole of it is one jitted call.

    Args:
      model: packed or not.
      encoder_input_tokens: ids, 0 is padding.
      length: of the output, at most.
      beams: how wide.
      eos_id: ends a sequence.

    Returns:
      Tokens, 0 after EOS, and scores of each row's K sequences, the best first; 0 and -1e7 where
      fewer have ended. If none has, they are the unfinished ones with their log probabilities.

    Raises:
      ValueError: an id outside of the vocabulary.
    """
    begun = decoding.start(model, encoder_input_tokens, length)
    tokens, scores = _search(
        model.module, model.variables, begun.cache, length, beams.num_decodes, beams.alpha, eos_id
    )
    return np.asarray(tokens), np.asarray(scores)


@functools.partial(jax.jit, static_argnames=("module", "length", "K", "eos_id"))
def _search(
    module: Switch,
    variables: Mapping[str, Any],
    cache: DecoderCache,
    length: int,
    K: int,
    alpha: Float[Array, ""],
    eos_id: int,
) -> tuple[Int32[Array, "B K L"], Float[Array, "B K"]]:
    B = cache.cross_mask.shape[0]
    nothing = jnp.zeros((B, K, length), jnp.int32)
    empty = jnp.full((B, K), NO_BEAM)
    state = Search(
        live=nothing,
        live_log_prob=empty.at[:, 0].set(0.0),  # all beams are equal before the first token
        finished=nothing,
        finished_score=empty,
        position=jnp.int32(0),
        cache=_own(cache, lambda leaf: jnp.repeat(leaf, K, axis=0)),
    )

    def goes_on(state: Search):
        # The best that a live beam can still become: log probabilities only fall.
        bound_B = state.live_log_prob[:, 0] / _brevity(jnp.int32(length), alpha)
        return (state.position < length) & jnp.any(bound_B > state.finished_score[:, -1])

    done = lax.while_loop(
        goes_on, lambda state: _step(module, variables, state, alpha, eos_id), state
    )
    none_B = done.finished_score[:, 0] <= NO_BEAM / 2
    tokens = jnp.where(none_B[:, None, None], done.live, done.finished)
    scores = jnp.where(none_B[:, None], done.live_log_prob, done.finished_score)
    real_BK = scores > NO_BEAM / 2
    return jnp.where(real_BK[:, :, None], tokens, 0), jnp.where(real_BK, scores, NO_BEAM)


def _step(
    module: Switch,
    variables: Mapping[str, Any],
    state: Search,
    alpha: Float[Array, ""],
    eos_id: int,
) -> Search:
    """One token more for every live beam."""
    B, K = state.live_log_prob.shape
    before = jnp.maximum(state.position - 1, 0)
    last_BK = lax.dynamic_index_in_dim(state.live, before, 2, keepdims=False)  # 0 at first
    everyone = jnp.ones(B * K, bool)
    found: Any = module.apply(
        variables, last_BK.reshape(-1), state.cache, state.position, everyone, method="step"
    )
    logits_NV, cache = found
    log_probs_BKV = jax.nn.log_softmax(logits_NV, axis=-1).reshape(B, K, -1)
    V = log_probs_BKV.shape[2]
    sums_BKV = state.live_log_prob[:, :, None] + log_probs_BKV
    # Of 2K at most K say EOS, one for each beam: K stay alive.
    best_B2K, place_B2K = lax.top_k(sums_BKV.reshape(B, -1), min(2 * K, K * V))
    parent_B2K, token_B2K = place_B2K // V, (place_B2K % V).astype(jnp.int32)
    grown = jnp.take_along_axis(state.live, parent_B2K[:, :, None], axis=1)
    grown = lax.dynamic_update_slice_in_dim(grown, token_B2K[:, :, None], state.position, 2)
    ends_B2K = token_B2K == eos_id

    alive_B2K = jnp.where(ends_B2K, NO_BEAM, best_B2K)
    live_log_prob, chosen_BK = lax.top_k(alive_B2K, K)
    parent_BK = jnp.take_along_axis(parent_B2K, chosen_BK, axis=1)
    row_BK = jnp.arange(B)[:, None] * K + parent_BK

    # T5X lets a place without a sequence (NO_BEAM) end as well; here it must have been one.
    real_B2K = ends_B2K & (best_B2K > NO_BEAM / 2)
    score_B2K = best_B2K / _brevity(state.position + 1, alpha)
    scores = jnp.concatenate(
        [state.finished_score, jnp.where(real_B2K, score_B2K, NO_BEAM)], axis=1
    )
    finished_score, kept_BK = lax.top_k(scores, K)
    sequences = jnp.concatenate([state.finished, grown], axis=1)
    return Search(
        live=jnp.take_along_axis(grown, chosen_BK[:, :, None], axis=1),
        live_log_prob=live_log_prob,
        finished=jnp.take_along_axis(sequences, kept_BK[:, :, None], axis=1),
        finished_score=finished_score,
        position=state.position + 1,
        cache=_own(cache, lambda leaf: leaf[row_BK.reshape(-1)]),
    )


def _own(cache: DecoderCache, change: Callable[[Array], Array]) -> DecoderCache:
    """Of the encoder all beams of a row know the same; what differs is of their own tokens."""
    blocks = [block._replace(own=jax.tree.map(change, block.own)) for block in cache.blocks]
    return cache._replace(blocks=tuple(blocks))


def _brevity(length: Int[Array, ""], alpha: Float[Array, ""]) -> Float[Array, ""]:
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha
