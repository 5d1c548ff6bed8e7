# SPDX-License-Identifier: Apache-2.0
"""The Switch Transformer, whole or block by block, over parameters named as in T5X.

`Switch` applies all of it. A driver that holds one layer at a time does the same in steps:

    masks = encoder_masks(tokens)
    bias = relpos_bias(config, params, "encoder", tokens.shape[1], dtype)
    x = embed(params, tokens, dtype)
    for i in range(config.num_encoder_layers):
        x = make_block(config, "encoder", i, dtype).apply({"params": block_params}, x, masks, bias)
    encoded = final_norm(params, "encoder", x, masks, dtype)

and likewise for the decoder, whose blocks also take `encoded`, then `logits`. There `params` needs
only what stands outside the blocks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.attention import (
    Masks,
    RelativePositionBias,
    decoder_masks,
    encoder_masks,
    position_bias,
)
from qmoe_jax.models.block import BlockCache, make_block, sublayer_dropout
from qmoe_jax.models.config import Stack, SwitchConfig, num_layers
from qmoe_jax.models.layers import (
    Kernel,
    RmsNorm,
    TokenEmbedder,
    embed_tokens,
    kernel_init,
    rms_norm,
    tied_logits,
    untied_logits,
    zero_padding,
)
from qmoe_jax.models.moe import ExpertsFn
from qmoe_jax.models.routing import Capacity


class DecoderCache(NamedTuple):
    """What the decoder remembers of a batch while it decodes token by token."""

    blocks: tuple[BlockCache, ...]
    cross_mask: Bool[Array, "P 1 S"]  # of the prompts


class LayerStack(nn.Module):
    """The encoder or the decoder, from embedded tokens to its normed output."""

    config: SwitchConfig
    stack: Stack
    dtype: DTypeLike = jnp.float32
    experts: ExpertsFn | None = None
    capacity: Capacity = "none"

    def setup(self) -> None:
        config, stack = self.config, self.stack
        self.relpos_bias = RelativePositionBias(config, stack, self.dtype)
        self.layers = [
            make_block(config, stack, i, self.dtype, self.experts, self.capacity)
            for i in range(num_layers(config, stack))
        ]
        setattr(self, f"{stack}_norm", RmsNorm(self.dtype))
        if stack == "decoder" and not config.logits_via_embedding:
            self.logits_dense = Kernel(
                (config.emb_dim, config.vocab_size), kernel_init("truncated_normal")
            )
        self.dropout = sublayer_dropout(config)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        masks: Masks,
        encoded_BSD: Float[Array, "B S D"] | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "B L D"]:
        bias_HLL = self.relpos_bias(x_BLD.shape[1])
        x_BLD = self.dropout(x_BLD, deterministic=not enable_dropout)
        for layer in self.layers:
            x_BLD = layer(x_BLD, masks, bias_HLL, encoded_BSD, enable_dropout=enable_dropout)
        x_BLD = getattr(self, f"{self.stack}_norm")(x_BLD)
        x_BLD = self.dropout(x_BLD, deterministic=not enable_dropout)
        return zero_padding(x_BLD, masks.valid)

    def step(
        self,
        x_B1D: Float[Array, "B 1 D"],
        cache: DecoderCache,
        position: Int[Array, ""],
        valid_B: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B 1 D"], DecoderCache]:
        """One position of the decoder, from its embedded token to the normed output."""
        length = cache.blocks[0].own.key.shape[1]
        bias_H1L = self.relpos_bias(length, position[None])
        blocks = []
        for layer, own in zip(self.layers, cache.blocks, strict=True):
            fixed = (position, bias_H1L, cache.cross_mask, valid_B[:, None])
            x_B1D, own = layer.step(x_B1D, own, *fixed)
            blocks.append(own)
        x_B1D = getattr(self, f"{self.stack}_norm")(x_B1D)
        return x_B1D, DecoderCache(tuple(blocks), cache.cross_mask)

    def logits(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """`untied_logits` with the decoder's `logits_dense`."""
        return untied_logits(self.logits_dense(), x_BLD)


class Switch(nn.Module):
    """Encoder, decoder and logits; `init` gives exactly the tree of `config.param_shapes`.

    Attributes:
      dtype: of activations (T5X: ACTIVATION_DTYPE). Parameters and logits are float32.
      experts: what computes the experts, None for dense stacks; see `moe.ExpertsFn`.
      capacity: "none" drops no token, "t5x" drops as T5X on one device does.
    """

    config: SwitchConfig
    dtype: DTypeLike = jnp.float32
    experts: ExpertsFn | None = None
    capacity: Capacity = "none"

    def setup(self) -> None:
        config = self.config
        self.token_embedder = TokenEmbedder(config.vocab_size, config.emb_dim, self.dtype)
        self.encoder = LayerStack(config, "encoder", self.dtype, self.experts, self.capacity)
        self.decoder = LayerStack(config, "decoder", self.dtype, self.experts, self.capacity)

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B L"],
        decoder_target_tokens: Int[Array, "B L"],
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "B L V"]:
        """Logits under teacher forcing, float32; exactly 0 at padded positions of the decoder.

        Args:
          encoder_input_tokens: ids, 0 is padding.
          decoder_input_tokens: the targets shifted right by one, starting with 0.
          decoder_target_tokens: ids; they decide what the decoder may attend to.
          enable_dropout: training; needs the rng `dropout` where a rate is not 0, and selects the
            capacity factor of training.
        """
        encoded_BSD = self.encode(encoder_input_tokens, enable_dropout=enable_dropout)
        return self.decode(
            encoded_BSD,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            enable_dropout=enable_dropout,
        )

    def encode(
        self, encoder_input_tokens: Int[Array, "B S"], *, enable_dropout: bool = False
    ) -> Float[Array, "B S D"]:
        """The encoder's normed output, in `dtype`; 0 at padding."""
        x_BSD = self.token_embedder(encoder_input_tokens)
        return self.encoder(
            x_BSD, encoder_masks(encoder_input_tokens), enable_dropout=enable_dropout
        )

    def decode(
        self,
        encoded_BSD: Float[Array, "B S D"],
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B L"],
        decoder_target_tokens: Int[Array, "B L"],
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "B L V"]:
        """Logits of all positions of the decoder at once, from the encoder's output."""
        masks = decoder_masks(decoder_input_tokens, decoder_target_tokens, encoder_input_tokens)
        x_BLD = self.token_embedder(decoder_input_tokens)
        x_BLD = self.decoder(x_BLD, masks, encoded_BSD, enable_dropout=enable_dropout)
        return self._logits(x_BLD)

    def start_cache(
        self,
        encoded_BSD: Float[Array, "B S D"],
        encoder_input_tokens: Int[Array, "B S"],
        length: int,
    ) -> DecoderCache:
        """The cache before the first of `length` positions; keys and values of the encoder's
        output are computed here, once."""
        blocks = tuple(layer.start_cache(encoded_BSD, length) for layer in self.decoder.layers)
        return DecoderCache(blocks, (encoder_input_tokens > 0)[:, None, :])

    def step(
        self,
        tokens_B: Int[Array, " B"],
        cache: DecoderCache,
        position: Int[Array, ""],
        valid_B: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """Logits of the token after `tokens`, which are the decoder's inputs at `position`.

        Equal to `decode` at that position, whose inputs before it are those of the steps before,
        in valid rows; what comes of the others is of no use, and no expert computes it.
        """
        x_B1D = self.token_embedder(tokens_B[:, None])
        x_B1D, cache = self.decoder.step(x_B1D, cache, position, valid_B)
        return self._logits(x_B1D)[:, 0], cache

    def _logits(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        if self.config.logits_via_embedding:
            return self.token_embedder.logits(x_BLD)
        return self.decoder.logits(x_BLD)


def embed(
    params: Mapping[str, Any], tokens_BL: Int[Array, "B L"], dtype: DTypeLike
) -> Float[Array, "B L D"]:
    """Embedded tokens of either stack, in `dtype`."""
    return embed_tokens(params["token_embedder"]["embedding"], tokens_BL, dtype)


def relpos_bias(
    config: SwitchConfig, params: Mapping[str, Any], stack: Stack, length: int, dtype: DTypeLike
) -> Float[Array, "H L L"]:
    """The position bias that all layers of `stack` take, for sequences of `length` positions."""
    rel_embedding = params[stack]["relpos_bias"]["rel_embedding"]
    positions_L = jnp.arange(length)
    return position_bias(config, stack, rel_embedding, positions_L, positions_L, dtype)


def final_norm(
    params: Mapping[str, Any],
    stack: Stack,
    x_BLD: Float[Array, "B L D"],
    masks: Masks,
    dtype: DTypeLike,
) -> Float[Array, "B L D"]:
    """The output of `stack` from its last residual, in `dtype`; 0 at padding."""
    scale_D = params[stack][f"{stack}_norm"]["scale"]
    return zero_padding(rms_norm(x_BLD, scale_D, dtype), masks.valid)


def logits(
    config: SwitchConfig, params: Mapping[str, Any], x_BLD: Float[Array, "B L D"]
) -> Float[Array, "B L V"]:
    """Float32 logits from the decoder's output."""
    if config.logits_via_embedding:
        return tied_logits(params["token_embedder"]["embedding"], x_BLD)
    return untied_logits(params["decoder"]["logits_dense"]["kernel"], x_BLD)
