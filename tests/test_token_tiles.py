# SPDX-License-Identifier: Apache-2.0
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import token_tiles

TILES = jax.jit(token_tiles.token_tiles, static_argnums=(1, 2))


@pytest.mark.parametrize("height", [1, 2, 8])
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(cuts=st.lists(st.integers(0, 40), min_size=5, max_size=5))
def test_tiles_hold_every_token_once_and_one_expert_each(cuts, height):
    tokens = 40
    sizes = np.diff([0, *sorted(cuts)])
    tiles = TILES(jnp.asarray(sizes, jnp.int32), tokens, height)
    owner = np.repeat(np.arange(6), [*sizes, tokens - sizes.sum()])
    seen = []
    for expert, first, stop in zip(*map(np.asarray, jax.tree.leaves(tiles)), strict=True):
        assert stop - first <= height
        assert (owner[first:stop] == expert).all()
        seen += range(first, stop)
    assert seen == list(range(tokens))


@pytest.mark.parametrize("sizes", [(30, 30, 30), (100, 0, 0), (-5, 50, 3)])
def test_no_tile_reaches_outside_whatever_the_sizes(sizes):
    tiles = TILES(jnp.asarray(sizes, jnp.int32), 40, 8)
    first, stop, expert = (np.asarray(a) for a in (tiles.first, tiles.stop, tiles.expert))
    assert ((first >= 0) & (stop <= 40) & (expert >= 0) & (expert <= 3)).all()
    covered = np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)])
    assert sorted(covered) == list(range(40))
