# SPDX-License-Identifier: Apache-2.0
"""One block of the model, dense or sparse, as a unit that runs on its own parameters.

A sparse block falls into three, so that its experts need not be in memory together: `dense_part`,
the experts applied to the normed rows of the residual, and `x + prob * experts(...)`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.attention import Attention, KeysValues, Masks
from qmoe_jax.models.config import ATTENTIONS, Stack, SwitchConfig, sparse_layers
from qmoe_jax.models.layers import Mlp, RmsNorm, add_residual, zero_padding
from qmoe_jax.models.moe import ExpertsFn, MoeMlp
from qmoe_jax.models.routing import Capacity


class BlockCache(NamedTuple):
    """What a block of the decoder remembers while it decodes token by token."""

    own: KeysValues  # of the L positions; those to come are not attended to
    cross: KeysValues  # of the encoder's output


class Block(nn.Module):
    """`layers_{i}` of either stack: attentions, then an MLP or experts.

    Each of these takes normed inputs and adds its output to the residual stream.

    Attributes:
      sparse: whether the MLP is a set of experts.
      dtype: of the sub-layers; the residual stream becomes float32 at the first sparse block.
      experts, capacity: see `MoeMlp`; of no effect in a dense block.
    """

    config: SwitchConfig
    stack: Stack
    sparse: bool
    dtype: DTypeLike = jnp.float32
    experts: ExpertsFn | None = None
    capacity: Capacity = "none"

    def setup(self) -> None:
        config = self.config
        for attention, norm in ATTENTIONS[self.stack]:
            setattr(self, norm, RmsNorm(self.dtype))
            setattr(self, attention, Attention(config, self.dtype))
        self.pre_mlp_layer_norm = RmsNorm(self.dtype)
        if self.sparse:
            self.mlp = MoeMlp(config, self.experts, self.capacity)
        else:
            rate = config.dropout_rate
            self.mlp = Mlp(config.mlp_dim, config.mlp_activations, rate, self.dtype)
        self.dropout = sublayer_dropout(config)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        masks: Masks,
        bias_HLL: Float[Array, "H L L"],
        encoded_BSD: Float[Array, "B S D"] | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "B L D"]:
        """The residual stream `x_BLD` after the block; the decoder needs `encoded_BSD`."""
        x_BLD = self._attend(x_BLD, masks, bias_HLL, encoded_BSD, enable_dropout)
        return self._mlp_part(x_BLD, masks.valid, enable_dropout)

    def _mlp_part(self, x_BLD, valid_BL, enable_dropout: bool = False) -> Float[Array, "B L D"]:
        y_BLD = zero_padding(self.pre_mlp_layer_norm(x_BLD), valid_BL)
        if isinstance(self.mlp, MoeMlp):
            y_BLD = self.mlp(y_BLD, valid_BL, enable_dropout=enable_dropout)
        else:
            y_BLD = self.mlp(y_BLD, enable_dropout=enable_dropout)
        return add_residual(x_BLD, self.dropout(y_BLD, deterministic=not enable_dropout))

    def dense_part(
        self,
        x_BLD: Float[Array, "B L D"],
        masks: Masks,
        bias_HLL: Float[Array, "H L L"],
        encoded_BSD: Float[Array, "B S D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Int[Array, "B L"], Float[Array, "B L"]]:
        """A sparse block up to its experts, whose parameters it does not need.

        Returns:
          The residual stream after attention; the expert of each token, E for dropped ones and
          for padding; the float32 probability that multiplies the expert's output.

        Raises:
          ValueError: the block is dense.
        """
        if not isinstance(self.mlp, MoeMlp):
            raise ValueError("`dense_part` is for sparse blocks: a dense one has no experts.")
        x_BLD = self._attend(x_BLD, masks, bias_HLL, encoded_BSD, False)
        y_BLD = zero_padding(self.pre_mlp_layer_norm(x_BLD), masks.valid)
        return x_BLD, *self.mlp.route(y_BLD, masks.valid)

    def start_cache(self, encoded_BSD: Float[Array, "B S D"], length: int) -> BlockCache:
        """For `length` positions, none of them decoded yet; the block is the decoder's."""
        cross = self.encoder_decoder_attention.keys_values(encoded_BSD)
        B, _, H, K = cross.key.shape
        nothing = jnp.zeros((B, length, H, K), cross.key.dtype)
        return BlockCache(KeysValues(nothing, nothing), cross)

    def step(
        self,
        x_B1D: Float[Array, "B 1 D"],
        cache: BlockCache,
        position: Int[Array, ""],
        bias_H1L: Float[Array, "H 1 L"],
        cross_mask_P1S: Bool[Array, "P 1 S"],
        valid_B1: Bool[Array, "B 1"],
    ) -> tuple[Float[Array, "B 1 D"], BlockCache]:
        """One position of the decoder, after those that `cache` holds; returns the next cache.

        Rows that are not valid go to no expert. The B rows are those of P prompts, equally many of
        each.
        """
        y_B1D = self.pre_self_attention_layer_norm(x_B1D)
        new = self.self_attention.keys_values(y_B1D)
        own = KeysValues(
            *(
                lax.dynamic_update_slice_in_dim(old, one, position, 1)
                for old, one in zip(cache.own, new, strict=True)
            )
        )
        B, L = own.key.shape[:2]
        seen_B1L = jnp.broadcast_to(jnp.arange(L) <= position, (B, 1, L))
        x_B1D = add_residual(x_B1D, self.self_attention.attend(y_B1D, own, seen_B1L, bias_H1L))
        y_B1D = self.pre_cross_attention_layer_norm(x_B1D)
        y_B1D = self._cross_step(y_B1D, cache.cross, cross_mask_P1S)
        x_B1D = self._mlp_part(add_residual(x_B1D, y_B1D), valid_B1)
        return x_B1D, BlockCache(own, cache.cross)

    def _cross_step(self, y_B1D, seen: KeysValues, cross_mask_P1S) -> Float[Array, "B 1 D"]:
        """Rows that share a prompt are to its keys as positions of one row."""
        P, _, S = cross_mask_P1S.shape
        B, _, D = y_B1D.shape
        mask_PRS = jnp.broadcast_to(cross_mask_P1S, (P, B // P, S))
        y_PRD = y_B1D.reshape(P, B // P, D)
        return self.encoder_decoder_attention.attend(y_PRD, seen, mask_PRS).reshape(B, 1, D)

    def _attend(
        self,
        x_BLD: Float[Array, "B L D"],
        masks: Masks,
        bias_HLL: Float[Array, "H L L"],
        encoded_BSD: Float[Array, "B S D"] | None,
        enable_dropout: bool,
    ) -> Float[Array, "B L D"]:
        for attention, norm in ATTENTIONS[self.stack]:
            y_BLD = zero_padding(getattr(self, norm)(x_BLD), masks.valid)
            if attention == "encoder_decoder_attention":
                arguments = (encoded_BSD, masks.cross, None)
            else:
                arguments = (y_BLD, masks.attention, bias_HLL)
            y_BLD = getattr(self, attention)(y_BLD, *arguments, enable_dropout=enable_dropout)
            x_BLD = add_residual(x_BLD, self.dropout(y_BLD, deterministic=not enable_dropout))
        return x_BLD


def make_block(
    config: SwitchConfig,
    stack: Stack,
    index: int,
    dtype: DTypeLike = jnp.float32,
    experts: ExpertsFn | None = None,
    capacity: Capacity = "none",
) -> Block:
    """Block `index` of `stack`; its parameters are those below `{stack}/layers_{index}`.

    Dense blocks of a stack are equal as modules, and so are sparse ones: a function jitted with
    the block as a static argument compiles once for each kind.
    """
    sparse = index in sparse_layers(config, stack)
    return Block(config, stack, sparse, dtype, experts, capacity)


def sublayer_dropout(config: SwitchConfig) -> nn.Dropout:
    """The dropout after sub-layers, embeddings and final norms: one mask for all positions."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
