# SPDX-License-Identifier: Apache-2.0
"""The trees of the "tunstall" codec are those that their description gives."""

import codec_oracles as oracle
import numpy as np
import pytest

from pallas_kernels import tunstall_words
from pallas_kernels.tunstall_words import MAX_LENGTH, TREES
from qmoe_jax.codec import tunstall

SHARES = (0.84, 0.885, 0.92, 0.95)


@pytest.mark.parametrize("tree", range(TREES))
def test_leaves_are_those_of_a_tree_grown_node_by_node(tree):
    leaves = oracle.tree_leaves(*tunstall.COSTS[tree])
    built = tunstall.build(tree)
    assert len(leaves) == tunstall_words.WORDS
    assert built.lengths.tolist() == [len(string) for string in leaves]
    positions = np.full((len(leaves), 4), MAX_LENGTH)
    for leaf, string in enumerate(leaves):
        found = [i for i, symbol in enumerate(string) if symbol == "1"]
        positions[leaf, : len(found)] = found
    np.testing.assert_array_equal(built.positions, positions)


@pytest.mark.parametrize(("tree", "zeros"), list(enumerate(SHARES)))
def test_costs_are_of_round_shares(tree, zeros):
    expected = [round(-np.log2(share) * 2**16) for share in (zeros, 1 - zeros)]
    assert list(tunstall.COSTS[tree]) == expected


@pytest.mark.parametrize(
    ("zeros", "most"), [(0.85, 1.04), (0.885, 1.022), (0.9, 1.025), (0.92, 1.03), (0.95, 1.036)]
)
def test_rate_on_independent_weights(zeros, most):
    """16 bits for the mean length of a word, and a bit for each sign, over the entropy."""
    weights = 10**6
    built = tunstall.build(tunstall.best_tree(round(zeros * weights), round((1 - zeros) * weights)))
    nonzeros = (built.positions < MAX_LENGTH).sum(axis=1)
    lengths = built.lengths.astype(np.float64)
    likely = zeros ** (lengths - nonzeros) * (1 - zeros) ** nonzeros
    assert likely.sum() == pytest.approx(1)
    entropy = -zeros * np.log2(zeros) - (1 - zeros) * np.log2((1 - zeros) / 2)
    assert (16 / (likely @ lengths) + 1 - zeros) / entropy < most


@pytest.mark.parametrize("tree", range(TREES))
def test_entries_tell_every_word(tree):
    built = tunstall.build(tree)
    entries = tunstall.entries().reshape(TREES, -1)[tree]
    np.testing.assert_array_equal(tunstall_words.entry_length(entries), built.lengths)
    counts = (built.positions < MAX_LENGTH).sum(axis=1)
    np.testing.assert_array_equal(tunstall_words.entry_count(entries), counts)
    for field in range(tunstall_words.MAX_NONZEROS):
        has = tunstall_words.entry_has(entries, field)
        np.testing.assert_array_equal(has, counts > field)
        position = tunstall_words.entry_position(entries, field)
        np.testing.assert_array_equal(position[has], built.positions[has, field])


def test_the_best_tree_is_the_nearest():
    for tree, zeros in enumerate(SHARES):
        assert tunstall.best_tree(round(1000 * zeros), round(1000 * (1 - zeros))) == tree
    assert tunstall.best_tree(0, 1000) == 0
    assert tunstall.best_tree(1000, 0) == TREES - 1
