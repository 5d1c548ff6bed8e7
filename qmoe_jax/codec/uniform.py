# SPDX-License-Identifier: Apache-2.0
"""Levels of 2 to 4 bits to `UniformExperts` and back: one bit plane per bit, 32 columns a word."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, UInt8, UInt32

from pallas_kernels.packed import CHUNK_LEVELS, HostOrDevice, UniformExperts

BITS = (2, 3, 4)
WHOLE_ROW = -1  # `group_size` of one scale and zero per row


def pack_uniform(
    levels: UInt8[HostOrDevice, "experts rows columns"],
    scale: Float[HostOrDevice, "experts rows groups"],
    zero: Float[HostOrDevice, "experts rows groups"],
    bits: int,
    group_size: int = WHOLE_ROW,
) -> UniformExperts:
    """Packs levels ``0 .. 2**bits - 1``; `scale` and `zero` are kept as they are.

    Raises:
      ValueError: unknown `bits`, a level that does not fit, or arrays that do not match.
    """
    if bits not in BITS:
        raise ValueError(f"`bits` must be one of {BITS}, got {bits}")
    if (highest := int(jnp.asarray(levels).max(initial=0))) >= 2**bits:
        raise ValueError(f"`levels` of {bits} bits must be below {2**bits}, got {highest}")
    codes = _to_planes(jnp.asarray(levels), bits)
    experts, rows, columns = levels.shape
    scale, zero = jnp.asarray(scale), jnp.asarray(zero)
    packed = UniformExperts(codes, scale, zero, (experts, rows, columns), bits, group_size)
    validate(packed)
    return packed


def unpack_uniform(
    packed: UniformExperts, first: int | Int[Array, ""] = 0, count: int | None = None
) -> UInt8[Array, "count rows columns"]:
    """The levels of experts ``[first, first + count)``; by default of all.

    Jitted, and traceable inside other programs; `first` may be a traced index.

    Raises:
      ValueError: a static range that leaves the record.
    """
    experts = packed.codes.shape[0]
    size = experts if count is None else count
    if isinstance(first, int) and not 0 <= first < first + size <= experts:
        raise ValueError(f"experts [{first}, {first + size}) are not a part of {experts} experts")
    index = jnp.asarray(first, jnp.int32)
    return _from_planes(jnp.asarray(packed.codes), index, size, packed.shape[2])


def dequantize_uniform(
    levels: UInt8[Array, "experts rows columns"],
    scale: Float[Array, "experts rows groups"],
    zero: Float[Array, "experts rows groups"],
    group_size: int = WHOLE_ROW,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "experts rows columns"]:
    """Weights ``scale * (level - zero)``, computed in float32 and then cast to `dtype`."""
    columns = levels.shape[2]
    group = jnp.arange(columns) // (columns if group_size == WHOLE_ROW else group_size)
    scale_ERC, zero_ERC = (array.astype(jnp.float32)[:, :, group] for array in (scale, zero))
    return (scale_ERC * (levels.astype(jnp.float32) - zero_ERC)).astype(dtype)


def validate(packed: UniformExperts) -> None:
    """Checks that array sizes agree with the static fields; any bit pattern is a valid level.

    Raises:
      ValueError: naming the array at fault.
    """
    experts, rows, columns = packed.shape
    if packed.bits not in BITS:
        raise ValueError(f"`bits` must be one of {BITS}, got {packed.bits}")
    if min(packed.shape) < 1 or (packed.group_size != WHOLE_ROW and packed.group_size < 1):
        raise ValueError(
            f"`shape` must be positive and `group_size` positive or {WHOLE_ROW}, got {packed.shape}"
            f" and {packed.group_size}"
        )
    group_size = columns if packed.group_size == WHOLE_ROW else packed.group_size
    groups = (experts, rows, -(-columns // group_size))
    chunks = (experts, rows, -(-columns // CHUNK_LEVELS), packed.bits)
    for name, expected in {"codes": chunks, "scale": groups, "zero": groups}.items():
        if (got := getattr(packed, name).shape) != expected:
            raise ValueError(
                f"`{name}` of {packed.shape} experts, {packed.bits} bits and group size"
                f" {packed.group_size} must be {expected}, got {got}"
            )


@functools.partial(jax.jit, static_argnames="bits")
def _to_planes(
    levels_ERC: UInt8[Array, "experts rows columns"], bits: int
) -> UInt32[Array, "experts rows chunks bits"]:
    experts, rows, columns = levels_ERC.shape
    padded = jnp.pad(levels_ERC, ((0, 0), (0, 0), (0, -columns % CHUNK_LEVELS)))
    chunks = padded.reshape(experts, rows, -1, CHUNK_LEVELS).astype(jnp.uint32)
    lane = jnp.arange(CHUNK_LEVELS, dtype=jnp.uint32)
    planes = [(((chunks >> bit) & 1) << lane[None, None, None]).sum(axis=-1) for bit in range(bits)]
    return jnp.stack(planes, axis=-1).astype(jnp.uint32)


@functools.partial(jax.jit, static_argnames=("count", "columns"))
def _from_planes(
    codes: UInt32[Array, "experts rows chunks bits"],
    first: Int32[Array, ""],
    count: int,
    columns: int,
) -> UInt8[Array, "count rows columns"]:
    part = jax.lax.dynamic_slice_in_dim(codes, first, count)
    lane = jnp.arange(CHUNK_LEVELS, dtype=jnp.uint32)[None, None, None]
    levels = jnp.zeros((*part.shape[:3], CHUNK_LEVELS), jnp.uint8)
    for bit in range(codes.shape[3]):
        plane = (part[..., bit, None] >> lane) & 1
        levels |= plane.astype(jnp.uint8) << bit
    return levels.reshape(*part.shape[:2], -1)[..., :columns]
