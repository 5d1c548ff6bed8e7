# SPDX-License-Identifier: Apache-2.0
"""Products with ternary experts that are never written out: ``y[n] = x[n] @ decode(W[expert[n]])``.

Of a row only the non-zeros are visited, about one of nine weights (QMoE, section 4.3; there one
token a launch, here all tokens of all experts of a layer). The tokens are sorted by expert and cut
into tiles of equal height, none of which spans two experts: a tile's tokens share one decode. How
many tiles an expert needs is known on the device alone, so a launch covers the most there can be.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import grouped_matmul, sub1_decode, token_tiles, validation
from pallas_kernels import implementation as implementations
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import PackedExperts

_MAX_TILE_TOKENS = 8


def sub1_matmul(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " entries"],
    group_sizes: Int[Array, " experts"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "tokens rows"]:
    """Multiplies every token with its expert's matrix.

    Args:
      x: float32 or bfloat16, sorted by expert; tokens of no expert come last.
      packed: a valid record (`validation.validate`) of one slab; its columns are those of `x`.
      entries: the run-time table of its codec (`word_entries` of its words).
      group_sizes: tokens of each expert, from the first on; together at most `tokens`.
      implementation: see `implementation.resolve`; the kernels agree with "xla" up to the order
        in which float32 products are added.

    Returns:
      In the dtype of `x`, summed in float32; zero for tokens of no expert.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    _check(x, packed, entries, group_sizes)
    match implementations.resolve(implementation):
        case "xla":
            return sub1_matmul_xla(x, packed, entries, group_sizes)
        case "pallas":
            from pallas_kernels.device import sub1_matmul_pallas as device
        case "triton":
            from pallas_kernels.device import sub1_matmul_triton as device
    if not x.shape[0]:
        return jnp.zeros((0, packed.shape[1]), x.dtype)
    height = tile_tokens(x.shape[0], packed.shape[0])
    tiles = token_tiles.token_tiles(group_sizes, x.shape[0], height)
    return device.sub1_matmul(x, packed, entries, tiles, height)


@jax.jit
def sub1_matmul_xla(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " entries"],
    group_sizes: Int[Array, " experts"],
) -> Float[Array, "tokens rows"]:
    """The reference: decodes one expert after another, those without tokens left out."""

    def matrix(expert):
        return sub1_decode.decode_expert(packed, entries, expert, x.dtype)

    return grouped_matmul.by_expert(x, group_sizes, packed.shape[1], matrix)


def tile_tokens(tokens: int, experts: int) -> int:
    """Height of a tile: about the tokens of an expert, a power of two.

    A higher tile shares a decode among more tokens, and wastes more where an expert has fewer.
    """
    height = 1
    while height < _MAX_TILE_TOKENS and 2 * height * min(experts, tokens) <= tokens:
        height *= 2
    return height


def _check(x, packed: PackedExperts, entries, group_sizes) -> None:
    experts, _, columns = packed.shape
    if x.ndim != 2 or x.shape[1] != columns or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"`x` must be float32 or bfloat16 [tokens, {columns}], got {x.dtype} {x.shape}"
        )
    if group_sizes.shape != (experts,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"`group_sizes` must be integers [{experts}], got {group_sizes.dtype} "
            f"{group_sizes.shape}"
        )
    validation.check_kernel_operands(packed, entries)
