# SPDX-License-Identifier: Apache-2.0
"""The trees of the "tunstall" codec: which weights are zero, in 16-bit words near entropy.

A Tunstall code (Tunstall 1967) parses its source by a tree and names the leaf it arrives at: words
of equal length for strings of unequal length, about equally likely. Here the source is binary, zero
or non-zero; a non-zero's sign is an even bet that no code could shorten, and is stored beside the
words as it is (`pallas_kernels.tunstall_words`).

There are `TREES` trees, each grown for a share of zeros, and an expert is coded by that which suits
its own share best. A tree has 65,536 leaves. Its 65,535 inner nodes are the cheapest strings, in
the order of

    zeros * cost of a zero + nonzeros * cost of a non-zero,  nonzeros,  the string itself

with the costs in `COSTS`: integers, so that a tree is the same on every machine. A string of
`MAX_NONZEROS` non-zeros or of `MAX_LENGTH` symbols is always a leaf: it is what fits an entry of a
kernel's table, and costs 0.2% at 88.5% zeros. Leaves are numbered from left to right, zero before
non-zero. Nothing of it is stored with a model.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from jaxtyping import Int, UInt8, UInt32

from pallas_kernels import tunstall_words
from pallas_kernels.tunstall_words import MAX_LENGTH, MAX_NONZEROS, TREES, WORDS

# -log2 of a zero's and of a non-zero's probability, times 2**16; zeros are 84, 88.5, 92 and 95%.
# Half-way between two trees the better one costs 0.5%.
COSTS = ((16_485, 173_268), (11_551, 204_492), (7_884, 238_804), (4_850, 283_242))
STRIDE = 4  # symbols that a step of `parse_table` reads; no word is shorter
_INNER = WORDS - 1
_ENDS = np.uint32(1 << 31)


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """A tree, its inner nodes numbered by length, then from left to right.

    Attributes:
      children: of each inner node, by zero and by non-zero: an inner node, or `-1 - leaf`.
      positions: of each leaf's non-zeros; `MAX_LENGTH` where there is none.
      lengths: of each leaf's string.
    """

    children: Int[np.ndarray, "nodes 2"]
    positions: UInt8[np.ndarray, "leaves 4"]
    lengths: UInt8[np.ndarray, " leaves"]


@functools.cache
def build(tree: int) -> Tree:
    """One of the trees; built once a process in less than 0.1 s."""
    children, first_of_level = _grow(_inner_of_each_class(*COSTS[tree]))
    _number_leaves(children, first_of_level)
    return Tree(children, *_write_out(children, first_of_level))


@functools.cache
def entries() -> UInt32[np.ndarray, " entries"]:
    """The table for kernels, of all trees one after another (`tunstall_words.word_entries`)."""
    trees = [build(tree) for tree in range(TREES)]
    table = np.concatenate(
        [tunstall_words.word_entries(tree.positions, tree.lengths) for tree in trees]
    )
    table.flags.writeable = False
    return table


@functools.cache
def parse_table(tree: int) -> UInt32[np.ndarray, " steps"]:
    """What `STRIDE` symbols do: entry `16 * node + digit`, bit i of a digit is set if symbol i is
    a non-zero.

    Where no word ends, the entry is the node that they lead to. Where one does, bit 31 is set, the
    low 16 bits are the word, and bits 16 to 19 the node of the next word. No word ends twice in a
    step, for none is shorter than one.
    """
    children = build(tree).children
    digits = np.arange(1 << STRIDE)
    node = np.broadcast_to(np.arange(_INNER)[:, None], (_INNER, len(digits)))
    word = np.full(node.shape, -1)
    for symbol in range(STRIDE):
        child = children[node, digits >> symbol & 1]
        word = np.where(child < 0, -1 - child, word)
        node = np.maximum(child, 0)
    ended = _ENDS | (node << 16 | word).astype(np.uint32)
    return np.where(word >= 0, ended, node.astype(np.uint32)).reshape(-1)


@functools.cache
def tail_words(tree: int) -> UInt32[np.ndarray, " nodes"]:
    """The word of each inner node's string and zeros after it; bit 31 is set if all is zeros."""
    children = build(tree).children
    word = children[:, 0].copy()
    while (inner := word >= 0).any():
        word[inner] = children[word[inner], 0]
    leaf = (-1 - word).astype(np.uint32)
    return np.where(leaf == 0, _ENDS, leaf)  # the first leaf is the string of zeros


def best_tree(zeros: int, nonzeros: int) -> int:
    """The tree whose source would most likely give a matrix of so many zeros and non-zeros."""
    costs = [zero * zeros + nonzero * nonzeros for zero, nonzero in COSTS]
    return costs.index(min(costs))


def _inner_of_each_class(zero_cost: int, nonzero_cost: int) -> Int[np.ndarray, "length nonzeros"]:
    """How many strings of a length and a number of non-zeros are inner nodes: the first ones."""
    classes = [
        ((length - n) * zero_cost + n * nonzero_cost, n, length)
        for length in range(MAX_LENGTH)
        for n in range(min(length + 1, MAX_NONZEROS))
    ]
    inner, left = np.zeros((MAX_LENGTH + 1, MAX_NONZEROS + 1), np.int64), _INNER
    for _, n, length in sorted(classes):
        inner[length, n] = min(math.comb(length, n), left)
        left -= inner[length, n]
    return inner


def _grow(inner: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """`Tree.children` with all leaves as -1, and the first node of each level."""
    children = np.full((_INNER, 2), -1, np.int64)
    nonzeros = np.zeros(1, np.int64)  # of this level's inner nodes, from left to right
    first_of_level = [0]
    for length in range(1, MAX_LENGTH + 1):
        below = (nonzeros[:, None] + [0, 1]).reshape(-1)
        is_inner = np.zeros(len(below), bool)
        for n in range(MAX_NONZEROS):
            of_class = np.flatnonzero(below == n)
            is_inner[of_class[: inner[length, n]]] = True
        level = first_of_level[-1]
        first_of_level.append(level + len(nonzeros))
        ids = first_of_level[-1] + np.cumsum(is_inner) - 1
        children[level : first_of_level[-1]] = np.where(is_inner, ids, -1).reshape(-1, 2)
        nonzeros = below[is_inner]
        if not nonzeros.size:
            break
    return children, first_of_level


def _levels(first_of_level: list[int]) -> list[slice]:
    return [slice(*ends) for ends in itertools.pairwise(first_of_level)]


def _number_leaves(children: np.ndarray, first_of_level: list[int]) -> None:
    """Puts `-1 - leaf` where `children` has -1, leaves numbered from left to right."""
    leaves = np.zeros(_INNER, np.int64)  # below each inner node
    below = np.zeros(children.shape, np.int64)
    for level in reversed(_levels(first_of_level)):
        below[level] = np.where(children[level] < 0, 1, leaves[children[level]])
        leaves[level] = below[level].sum(axis=1)
    first = np.zeros(_INNER, np.int64)
    for level in _levels(first_of_level):
        begins = first[level, None] + np.stack([np.zeros_like(below[level, 0]), below[level, 0]], 1)
        inner = children[level] >= 0
        first[children[level][inner]] = begins[inner]
        children[level] = np.where(inner, children[level], -1 - begins)


def _write_out(children: np.ndarray, first_of_level: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """`Tree.positions` and `Tree.lengths`, one level after another."""
    positions = np.full((WORDS, MAX_NONZEROS), MAX_LENGTH, np.uint8)
    lengths = np.zeros(WORDS, np.uint8)
    path = np.full((_INNER, MAX_NONZEROS), MAX_LENGTH, np.uint8)  # of inner nodes
    for depth, level in enumerate(_levels(first_of_level)):
        for symbol in range(2):
            child, string = children[level, symbol], path[level].copy()
            if symbol:
                nonzeros = (string < MAX_LENGTH).sum(axis=1)
                string[np.arange(len(string)), nonzeros] = depth
            inner = child >= 0
            path[child[inner]] = string[inner]
            positions[-1 - child[~inner]] = string[~inner]
            lengths[-1 - child[~inner]] = depth + 1
    return positions, lengths
