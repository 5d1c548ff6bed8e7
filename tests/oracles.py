# SPDX-License-Identifier: Apache-2.0
"""Slow float64 NumPy versions of what the papers describe; no code shared with the package."""

import numpy as np


def fit_grid(rows: np.ndarray, bits) -> tuple[np.ndarray, np.ndarray]:
    """(min, max) or (scale, zero) of each row of `rows` [R, C]."""
    low = np.minimum(rows.min(1), 0)
    high = np.maximum(rows.max(1), 0)
    nothing = (low == 0) & (high == 0)
    low[nothing], high[nothing] = -1, 1
    if bits == "ternary":
        return low, high
    scale = (high - low) / (2**bits - 1)
    return scale, np.rint(-low / scale)


def to_grid(column: np.ndarray, grid: tuple[np.ndarray, np.ndarray], bits) -> np.ndarray:
    """`column` [R], each entry on its row's grid."""
    if bits == "ternary":
        low, high = grid
        return np.where(column > high / 2, high, np.where(column < low / 2, low, 0))
    scale, zero = grid
    return scale * (np.clip(np.rint(column / scale) + zero, 0, 2**bits - 1) - zero)


def gptq(weights, hessian, bits, damping=0.1, block_size=128, group_size=None, act_order=False):
    """Algorithm 1 of arXiv 2210.17323, with the inverse Hessian written out; W is [R, C]."""
    W = weights.astype(np.float64).copy()
    H = hessian.astype(np.float64).copy()
    C = W.shape[1]
    H[np.diag_indices(C)] += max(damping * np.mean(np.diag(H)), 1e-6)
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(C)
    W, H = W[:, order], H[order][:, order]
    grid = fit_grid(W, bits)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    Q = np.zeros_like(W)
    for start in range(0, C, block_size):
        stop = min(start + block_size, C)
        block = W[:, start:stop].copy()
        errors = np.zeros_like(block)
        for j in range(start, stop):
            if group_size and j % group_size == 0:
                grid = fit_grid(W[:, j : j + group_size], bits)
            column = block[:, j - start]
            Q[:, j] = to_grid(column, grid, bits)
            errors[:, j - start] = (column - Q[:, j]) / U[j, j]
            block[:, j - start :] -= np.outer(errors[:, j - start], U[j, j:stop])
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Q[:, np.argsort(order)]


def layer_error(weights, quantized, hessian) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    difference = (weights - quantized).astype(np.float64)
    return float(np.einsum("rc,cd,rd->", difference, hessian.astype(np.float64), difference))
