# SPDX-License-Identifier: Apache-2.0
"""Products with ternary experts that are never written out: ``y[n] = x[n] @ decode(W[expert[n]])``.

Of a row only the non-zeros are visited, about one of nine weights (QMoE, section 4.3; there one
token a launch, here all tokens of all experts of a layer). The tokens are sorted by expert and cut
into tiles of equal height, none of which spans two experts: a tile's tokens share one decode. How
many tiles an expert needs is known on the device alone, so a launch covers the most there can be.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt32

from pallas_kernels import implementation as implementations
from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_decode
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import PackedExperts

_MAX_TILE_TOKENS = 8
_XLA_TILE_TOKENS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTiles:
    """Where each tile of tokens lies and whose it is.

    Tokens of no expert have tiles too, of the expert E, so that their outputs become zero. Tiles
    that are not needed are empty.
    """

    expert: Int32[Array, " tiles"]  # E: no expert
    first: Int32[Array, " tiles"]  # token
    stop: Int32[Array, " tiles"]  # past the last token


def sub1_matmul(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " words"],
    group_sizes: Int[Array, " experts"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "tokens rows"]:
    """Multiplies every token with its expert's matrix.

    Args:
      x: float32 or bfloat16, sorted by expert; tokens of no expert come last.
      packed: a valid record (`packed.validate`) of one slab; its columns are those of `x`.
      entries: the run-time table of its dictionary (`packed.word_entries`).
      group_sizes: tokens of each expert, from the first on; together at most `tokens`.
      implementation: see `implementation.resolve`; the kernels agree with "xla" up to the order
        in which float32 products are added.

    Returns:
      In the dtype of `x`, summed in float32; zero for tokens of no expert.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    _check(x, packed, entries, group_sizes)
    if implementations.resolve(implementation) == "xla":
        return sub1_matmul_xla(x, packed, entries, group_sizes)
    if not x.shape[0]:
        return jnp.zeros((0, packed.shape[1]), x.dtype)
    height = tile_tokens(x.shape[0], packed.shape[0])
    tiles = token_tiles(group_sizes, x.shape[0], height)
    from pallas_kernels.device import sub1_matmul_pallas as device  # needs Pallas's Triton

    return device.sub1_matmul(x, packed, entries, tiles, height)


@functools.partial(jax.jit, static_argnames="height")
def sub1_matmul_xla(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " words"],
    group_sizes: Int[Array, " experts"],
    height: int = _XLA_TILE_TOKENS,
) -> Float[Array, "tokens rows"]:
    """The reference: decodes one expert after another, those without tokens left out."""
    tokens, rows = x.shape[0], packed.shape[1]
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes.astype(jnp.int32)
    active = jnp.argsort(group_sizes == 0, stable=True)  # those with tokens, in order
    padded = jnp.pad(x, ((0, height), (0, 0)))

    def one_expert(i, y):
        expert = active[i]
        weights_RC = sub1_decode.decode_expert(packed, entries, expert, x.dtype)

        def one_tile(tile, y):
            first = starts[expert] + tile * height
            x_TC = jax.lax.dynamic_slice_in_dim(padded, first, height)
            y_TR = jax.lax.dot_general(
                x_TC,
                weights_RC,
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            inside = (first + jnp.arange(height) < ends[expert])[:, None]
            old = jax.lax.dynamic_slice_in_dim(y, first, height)
            new = jnp.where(inside, y_TR.astype(y.dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(y, new, first, 0)

        tiles = -(-group_sizes[expert].astype(jnp.int32) // height)
        return jax.lax.fori_loop(0, tiles, one_tile, y)

    y = jnp.zeros((tokens + height, rows), x.dtype)
    return jax.lax.fori_loop(0, jnp.sum(group_sizes > 0), one_expert, y)[:tokens]


def tile_tokens(tokens: int, experts: int) -> int:
    """Height of a tile: about the tokens of an expert, a power of two.

    A higher tile shares a decode among more tokens, and wastes more where an expert has fewer.
    """
    height = 1
    while height < _MAX_TILE_TOKENS and 2 * height * min(experts, tokens) <= tokens:
        height *= 2
    return height


def token_tiles(group_sizes: Int[Array, " experts"], tokens: int, height: int) -> TokenTiles:
    """Cuts sorted tokens into tiles; as many as any `group_sizes` may need."""
    experts = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, tokens - jnp.sum(sizes, dtype=jnp.int32))
    tiles = -(-sizes // height)
    last_tiles, ends = jnp.cumsum(tiles), jnp.cumsum(sizes)
    count = -(-tokens // height) + min(experts + 1, tokens)
    tile = jnp.arange(count, dtype=jnp.int32)
    group = jnp.searchsorted(last_tiles, tile, side="right").astype(jnp.int32)
    group = jnp.minimum(group, experts)  # the tiles that nobody needs
    begin = ends[group] - sizes[group] + (tile - last_tiles[group] + tiles[group]) * height
    first = jnp.minimum(begin, tokens)
    return TokenTiles(group, first, jnp.minimum(first + height, ends[group]))


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
    packed_lib.check_kernel_operands(packed, entries)
