# SPDX-License-Identifier: Apache-2.0
"""Products with ternary experts by whichever of two paths suits the number of tokens.

    fused   `sub1_matmul`: decodes anew for every 8 tokens of an expert, writes nothing out
    dense   `sub1_decode` of the experts that have tokens, some at a time, then `grouped_matmul`

The first is for generation, the second for prompts and large batches.
"""

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import implementation as implementations
from pallas_kernels import validation
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import PackedExperts
from pallas_kernels.sub1_decode import sub1_decode
from pallas_kernels.sub1_matmul import sub1_matmul

Path: TypeAlias = Literal["auto", "fused", "dense"]

# Tokens an expert from which the dense path is taken. NOT measured: on an H200 the fused kernel
# issues about 1.4 lane-instructions a weight and token, 5e-14 s; the dense path moves 4 bytes a
# weight and decodes it once, 1.0e-12 s: even at 21 tokens, or 10 where gathers take twice as long.
DENSE_FROM_TOKENS = 16
SCRATCH_BYTES = 64 << 20  # of dense experts at a time


def packed_matmul(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " entries"],
    group_sizes: Int[Array, " experts"],
    *,
    implementation: Implementation = "auto",
    path: Path = "auto",
) -> Float[Array, "tokens rows"]:
    """Multiplies every token with its expert's matrix.

    Args:
      x, packed, entries, group_sizes, implementation: see `sub1_matmul`.
      path: "auto" takes "dense" from `DENSE_FROM_TOKENS` tokens an expert on, counted as if they
        were spread evenly, for their true numbers are known on the device alone. Without kernels
        ("xla") it is "fused", whose reference decodes each expert once.

    Raises:
      ValueError: shapes or dtypes that do not fit; no such path.
    """
    if path not in ("auto", "fused", "dense"):
        raise ValueError(f"`path` is {path!r}; expected 'auto', 'fused' or 'dense'")
    if path == "auto":
        path = choose_path(x.shape[0], packed.shape[0], implementation)
    if path == "fused":
        return sub1_matmul(x, packed, entries, group_sizes, implementation=implementation)
    return _by_decoding(x, packed, entries, group_sizes, implementation)


def choose_path(
    tokens: int, experts: int, implementation: Implementation
) -> Literal["fused", "dense"]:
    """What "auto" means for so many tokens and experts: inside `shard_map` all there are."""
    kernels = implementations.resolve(implementation) != "xla"
    many = tokens_per_expert(tokens, experts) >= DENSE_FROM_TOKENS
    return "dense" if kernels and many else "fused"


def tokens_per_expert(tokens: int, experts: int) -> float:
    """How many tokens an expert gets that gets any, if they spread evenly."""
    return tokens / max(1, min(tokens, experts))


@functools.partial(jax.jit, static_argnames=("implementation", "scratch_bytes"))
def _by_decoding(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " entries"],
    group_sizes: Int[Array, " experts"],
    implementation: Implementation,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Float[Array, "tokens rows"]:
    """The dense path; only experts that have tokens are decoded."""
    validation.check_kernel_operands(packed, entries)
    (tokens, columns), (experts, rows, _) = x.shape, packed.shape
    chunk = max(1, min(experts, scratch_bytes // (x.dtype.itemsize * rows * columns)))
    sizes = group_sizes.astype(jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    active = jnp.argsort(sizes == 0, stable=True).astype(jnp.int32)  # those with tokens, in order
    count = jnp.sum(sizes > 0, dtype=jnp.int32)
    padded = jnp.pad(x, ((0, tokens), (0, 0)))

    def multiply(i, y):
        place = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        expert = jnp.where(place < count, active[jnp.minimum(place, experts - 1)], experts)
        weights = sub1_decode(packed, entries, expert, dtype=x.dtype, implementation=implementation)
        # The tokens of these experts follow one another: those without tokens in between have none.
        first = starts[expert[0]]
        own = jnp.where(place < count, sizes[jnp.minimum(expert, experts - 1)], 0)
        own_x = lax.dynamic_slice_in_dim(padded, first, tokens)
        new = grouped_matmul(own_x, weights, own, implementation=implementation)
        old = lax.dynamic_slice_in_dim(y, first, tokens)
        inside = (jnp.arange(tokens) < jnp.sum(own))[:, None]
        return lax.dynamic_update_slice_in_dim(y, jnp.where(inside, new, old), first, 0)

    y = jnp.zeros((2 * tokens, rows), x.dtype)
    return lax.fori_loop(0, -(-count // chunk), multiply, y)[:tokens]
