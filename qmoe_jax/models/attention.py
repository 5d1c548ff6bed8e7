# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention of T5: relative position buckets, masks, unscaled dot products."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.config import Stack, SwitchConfig
from qmoe_jax.models.layers import INIT_SCALE, PRECISION, Dense, kernel_init

MASKED_LOGIT = -1e10


class Masks(NamedTuple):
    """Which positions exist, and which a position may attend to, in one stack."""

    valid: Bool[Array, "B L"]  # False rows are zeroed before every sub-layer
    attention: Bool[Array, "B L L"]  # [query, key] of self-attention
    cross: Bool[Array, "B L S"] | None = None  # [query, key]; decoder only


class KeysValues(NamedTuple):
    """What an attention looks at, split into heads."""

    key: Float[Array, "B S H K"]
    value: Float[Array, "B S H K"]


def encoder_masks(encoder_input_tokens: Int[Array, "B L"]) -> Masks:
    """Masks of the encoder; token 0 is padding, on both axes of the attention."""
    valid_BL = encoder_input_tokens > 0
    return Masks(valid_BL, valid_BL[:, :, None] & valid_BL[:, None, :])


def decoder_masks(
    decoder_input_tokens: Int[Array, "B L"],
    decoder_target_tokens: Int[Array, "B L"],
    encoder_input_tokens: Int[Array, "B S"],
) -> Masks:
    """Masks of the decoder under teacher forcing.

    Inputs are the targets shifted right, so that input 0 is also the start token: a position
    counts as valid if it or the next one holds a token, and position 0 always does. Attention
    goes by the targets instead, as in T5X.
    """
    present_BL = decoder_input_tokens > 0
    next_BL = jnp.pad(present_BL[:, 1:], ((0, 0), (0, 1)))
    valid_BL = (present_BL | next_BL).at[:, 0].set(True)
    target_BL = decoder_target_tokens > 0
    L = decoder_target_tokens.shape[1]
    causal_LL = jnp.tri(L, dtype=bool)
    return Masks(
        valid_BL,
        target_BL[:, :, None] & target_BL[:, None, :] & causal_LL[None],
        target_BL[:, :, None] & (encoder_input_tokens > 0)[:, None, :],
    )


def relpos_buckets(
    query_positions_L: Int[Array, " L"],
    key_positions_S: Int[Array, " S"],
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> Int[Array, "L S"]:
    """Bucket of each (query, key) distance: exact when near, logarithmic up to `max_distance`.

    The encoder (bidirectional) keeps half of the buckets for keys that come after the query; the
    decoder puts all of these into bucket 0.
    """
    distance_LS = query_positions_L[:, None] - key_positions_S[None, :]
    offset_LS = jnp.zeros_like(distance_LS)
    if bidirectional:
        num_buckets //= 2
        offset_LS = jnp.where(distance_LS < 0, num_buckets, 0)
        distance_LS = jnp.abs(distance_LS)
    distance_LS = jnp.maximum(distance_LS, 0)
    exact = num_buckets // 2
    ratio_LS = distance_LS.astype(jnp.float32) / exact + jnp.finfo(jnp.float32).eps
    steps_per_e = (num_buckets - exact) / math.log(max_distance / exact)
    far_LS = exact + (jnp.log(ratio_LS) * steps_per_e).astype(distance_LS.dtype)
    far_LS = jnp.minimum(far_LS, num_buckets - 1)
    return offset_LS + jnp.where(distance_LS < exact, distance_LS, far_LS)


def position_bias(
    config: SwitchConfig,
    stack: Stack,
    rel_embedding: Float[Array, "H buckets"],
    query_positions_L: Int[Array, " L"],
    key_positions_S: Int[Array, " S"],
    dtype: DTypeLike,
) -> Float[Array, "H L S"]:
    """What each head of a stack's self-attentions adds to its logits, by distance."""
    bucket_LS = relpos_buckets(
        query_positions_L,
        key_positions_S,
        bidirectional=stack == "encoder",
        num_buckets=config.relpos_num_buckets,
        max_distance=config.relpos_max_distance,
    )
    return rel_embedding.astype(dtype)[:, bucket_LS]


class RelativePositionBias(nn.Module):
    """`position_bias` with its parameter, shared by all blocks of a stack."""

    config: SwitchConfig
    stack: Stack
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, length: int, query_positions_L: Int[Array, " L"] | None = None
    ) -> Float[Array, "H L S"]:
        """For `length` keys; None: as many queries."""
        init = nn.initializers.variance_scaling(INIT_SCALE, "fan_avg", "uniform")
        shape = (self.config.num_heads, self.config.relpos_num_buckets)
        rel_embedding = self.param("rel_embedding", init, shape, jnp.float32)
        positions_S = jnp.arange(length)
        queries_L = positions_S if query_positions_L is None else query_positions_L
        return position_bias(
            self.config, self.stack, rel_embedding, queries_L, positions_S, self.dtype
        )


class Attention(nn.Module):
    """Multi-head attention without biases; kernels `query`, `key`, `value`, `out` are 2-D.

    The logits are not divided by sqrt(head_dim): the initializer of `query` is.
    """

    config: SwitchConfig
    dtype: DTypeLike

    def setup(self) -> None:
        config = self.config
        width = config.num_heads * config.head_dim
        init = kernel_init()
        self.query = Dense(width, self.dtype, _divided(init, math.sqrt(config.head_dim)))
        self.key = Dense(width, self.dtype, init)
        self.value = Dense(width, self.dtype, init)
        self.out = Dense(config.emb_dim, self.dtype, init)
        # T5X: one mask for all queries of a head
        self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        y_BSD: Float[Array, "B S D"],
        mask_BLS: Bool[Array, "B L S"],
        bias_HLS: Float[Array, "H L S"] | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "B L D"]:
        """Lets `x` attend to `y`; masked logits get -1e10 added; softmax in `dtype`."""
        seen = self.keys_values(y_BSD)
        return self.attend(x_BLD, seen, mask_BLS, bias_HLS, enable_dropout=enable_dropout)

    def attend(
        self,
        x_BLD: Float[Array, "B L D"],
        seen: KeysValues,
        mask_BLS: Bool[Array, "B L S"],
        bias_HLS: Float[Array, "H L S"] | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "B L D"]:
        """The same, of keys and values that are there already."""
        key_BSHK, value_BSHK = seen
        query_BLHK = self._heads(self.query(x_BLD))
        logits_BHLS = jnp.einsum("blhk,bshk->bhls", query_BLHK, key_BSHK, precision=PRECISION)
        bias_BHLS = jnp.where(mask_BLS, 0.0, MASKED_LOGIT).astype(self.dtype)[:, None]
        if bias_HLS is not None:
            bias_BHLS = bias_BHLS + bias_HLS[None]
        weights_BHLS = jax.nn.softmax(logits_BHLS + bias_BHLS, axis=-1)
        weights_BHLS = self.dropout(weights_BHLS, deterministic=not enable_dropout)
        mixed_BLHK = jnp.einsum("bhls,bshk->blhk", weights_BHLS, value_BSHK, precision=PRECISION)
        return self.out(mixed_BLHK.reshape(*x_BLD.shape[:2], -1))

    def keys_values(self, y_BSD: Float[Array, "B S D"]) -> KeysValues:
        """Keys and values of `y`."""
        return KeysValues(self._heads(self.key(y_BSD)), self._heads(self.value(y_BSD)))

    def _heads(self, x: Float[Array, "B S width"]) -> Float[Array, "B S H K"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)


def _divided(init: nn.initializers.Initializer, divisor: float) -> nn.initializers.Initializer:
    return lambda *args, **kwargs: init(*args, **kwargs) / divisor
