# SPDX-License-Identifier: Apache-2.0
"""Sorted tokens cut into tiles of equal height, none of which spans two experts.

How many tiles an expert needs is known on the device alone, so there are as many as any division of
the tokens among the experts can need.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32


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


def token_tiles(group_sizes: Int[Array, " experts"], tokens: int, height: int) -> TokenTiles:
    """Cuts sorted tokens into tiles; as many as any `group_sizes` may need.

    No tile reaches outside of the tokens, whatever `group_sizes` holds.
    """
    experts = group_sizes.shape[0]
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), tokens)
    ends = jnp.append(ends, jnp.int32(tokens))
    sizes = jnp.diff(ends, prepend=jnp.int32(0))
    tiles = -(-sizes // height)
    last_tiles = jnp.cumsum(tiles)
    count = -(-tokens // height) + min(experts + 1, tokens)
    tile = jnp.arange(count, dtype=jnp.int32)
    group = jnp.searchsorted(last_tiles, tile, side="right").astype(jnp.int32)
    group = jnp.minimum(group, experts)  # the tiles that nobody needs
    begin = ends[group] - sizes[group] + (tile - last_tiles[group] + tiles[group]) * height
    first = jnp.minimum(begin, tokens)
    return TokenTiles(group, first, jnp.minimum(first + height, ends[group]))
