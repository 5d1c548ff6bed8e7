# SPDX-License-Identifier: Apache-2.0
"""Decoding token by token, with keys and values kept: the likeliest tokens, or sampled ones."""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from qmoe_jax.inference.model import Model, checked_ids
from qmoe_jax.models.switch import DecoderCache, Switch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn, by the names of T5X's `decoding.temperature_sample`.

    Attributes:
      temperature: divides the logits, before anything else; 0 takes the likeliest token.
      topk: draw from the likeliest so many; 0: from all.
      topp: draw from the smallest set of likeliest tokens that has this probability; 0: from all.
    """

    temperature: float = 1.0
    topk: int = 0
    topp: float = 0.0

    def __post_init__(self):
        whole = operator.index(self.topk) >= 0  # a TypeError, if it is no integer
        if not (self.temperature >= 0 and whole and 0 <= self.topp <= 1):
            raise ValueError(
                f"temperature {self.temperature}, topk {self.topk}, topp {self.topp}: expected "
                "numbers that are not negative, and topp at most 1"
            )
        if self.topk and self.topp:
            raise ValueError(f"topk {self.topk} and topp {self.topp}: give one of them")


GREEDY = Sampling(temperature=0.0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "topp"),
    meta_fields=("greedy", "topk", "nucleus"),
)
@dataclasses.dataclass(frozen=True)
class Draw:
    """`Sampling` under jit: other numbers of the same kind need no other program."""

    temperature: Float[Array, ""]
    topp: Float[Array, ""]
    greedy: bool
    topk: int
    nucleus: bool


def under_jit(sampling: Sampling) -> Draw:
    """What of `sampling` the compiled program is made for, and what it is given."""
    return Draw(
        temperature=jnp.float32(sampling.temperature),
        topp=jnp.float32(sampling.topp),
        greedy=sampling.temperature == 0,
        topk=sampling.topk,
        nucleus=sampling.topp > 0,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """A batch as far as it is decoded."""

    tokens: Int32[Array, "B L"]  # 0 after EOS, and where nothing is decoded yet
    log_prob: Float[Array, " B"]  # of the tokens up to EOS, under the model itself
    ended: Bool[Array, " B"]
    position: Int32[Array, ""]  # the next one
    cache: DecoderCache
    key: Array  # of random numbers


def generate(
    model: Model,
    encoder_input_tokens: Int[np.ndarray, "B S"],
    length: int,
    *,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    eos_id: int = 1,
) -> tuple[Int32[np.ndarray, "B L"], Float[np.ndarray, " B"]]:
    """Decodes a batch until all rows have ended; the whole of it is one jitted call.

    Args:
      model: packed or not.
      encoder_input_tokens: ids, 0 is padding.
      length: of the output, at most.
      sampling: by default the likeliest token at each position.
      key: of random numbers; None: that of seed 0.
      eos_id: ends a row.

    Returns:
      Tokens, 0 after EOS; the natural logarithm of the probability that the model gives each row.
    """
    state = start(model, encoder_input_tokens, length, key=key)
    done = _run(model.module, model.variables, state, under_jit(sampling), eos_id)
    return np.asarray(done.tokens), np.asarray(done.log_prob)


def stream(
    model: Model,
    encoder_input_tokens: Int[np.ndarray, "B S"],
    length: int,
    *,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    eos_id: int = 1,
) -> Iterator[Int32[np.ndarray, " B"]]:
    """Yields the tokens of one position after another as they are decoded; see `generate`."""
    begun, draw = start(model, encoder_input_tokens, length, key=key), under_jit(sampling)

    def positions(state: Decoded) -> Iterator[Int32[np.ndarray, " B"]]:
        for position in range(length):
            state = _next(model.module, model.variables, state, draw, eos_id)
            yield np.asarray(state.tokens[:, position])
            if state.ended.all():
                return

    return positions(begun)


def start(
    model: Model,
    encoder_input_tokens: Int[np.ndarray, "B S"],
    length: int,
    *,
    key: Array | None = None,
) -> Decoded:
    """Runs the encoder; nothing is decoded yet.

    Raises:
      ValueError: an id outside of the vocabulary.
    """
    tokens_BS = checked_ids(model, "encoder_input_tokens", encoder_input_tokens)
    key = jax.random.key(0) if key is None else key
    return _start(model.module, model.variables, tokens_BS, length, key)


@functools.partial(jax.jit, static_argnames=("module", "length"))
def _start(
    module: Switch, variables: Mapping[str, Any], tokens_BS: Int[Array, "B S"], length: int, key
) -> Decoded:
    def run(module: Switch):
        return module.start_cache(module.encode(tokens_BS), tokens_BS, length)

    cache: Any = module.apply(variables, method=run)
    B = tokens_BS.shape[0]
    tokens_BL, ended_B = jnp.zeros((B, length), jnp.int32), jnp.zeros(B, bool)
    own = jax.random.fold_in(key, 0)  # the caller's is not ours to write over
    return Decoded(tokens_BL, jnp.zeros(B), ended_B, jnp.int32(0), cache, own)


@functools.partial(jax.jit, static_argnames=("module", "eos_id"))
def _run(
    module: Switch, variables: Mapping[str, Any], state: Decoded, draw: Draw, eos_id: int
) -> Decoded:
    length = state.tokens.shape[1]
    return lax.while_loop(
        lambda state: (state.position < length) & ~state.ended.all(),
        lambda state: _step(module, variables, state, draw, eos_id),
        state,
    )


def _step(
    module: Switch, variables: Mapping[str, Any], state: Decoded, draw: Draw, eos_id: int
) -> Decoded:
    """One token more for every row that has not ended."""
    before = jnp.maximum(state.position - 1, 0)
    last_B = lax.dynamic_index_in_dim(state.tokens, before, 1, keepdims=False)
    last_B = jnp.where(state.position == 0, 0, last_B)  # the start token
    found: Any = module.apply(
        variables, last_B, state.cache, state.position, ~state.ended, method="step"
    )
    logits_BV, cache = found
    key, drawing = jax.random.split(state.key)
    token_B = choose(logits_BV, draw, drawing)
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    own_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=1)[:, 0]
    token_B = jnp.where(state.ended, 0, token_B)
    return Decoded(
        tokens=lax.dynamic_update_slice_in_dim(state.tokens, token_B[:, None], state.position, 1),
        log_prob=state.log_prob + jnp.where(state.ended, 0.0, own_B),
        ended=state.ended | (token_B == eos_id),
        position=state.position + 1,
        cache=cache,
        key=key,
    )


# By itself; the state's arrays, caches above all, are written over.
_next = jax.jit(_step, static_argnames=("module", "eos_id"), donate_argnames=("state",))


def choose(logits_BV: Float[Array, "B V"], draw: Draw, key: Array) -> Int32[Array, " B"]:
    """Draws a token for each row."""
    if draw.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / draw.temperature
    if draw.topk:
        kth_B1 = lax.top_k(logits_BV, min(draw.topk, logits_BV.shape[1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if draw.nucleus:
        sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        cumulative_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        last_B1 = jnp.sum(cumulative_BV < draw.topp, axis=-1, keepdims=True)
        last_B1 = jnp.minimum(last_B1, logits_BV.shape[1] - 1)
        least_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
