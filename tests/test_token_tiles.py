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
