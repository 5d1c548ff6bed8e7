# SPDX-License-Identifier: Apache-2.0
"""What every sub-layer is made of: RMS norm, bias-free kernels, MLP, token embedding.

The arithmetic stands in plain functions, so that it can be applied to arrays just read from a
checkpoint; the Linen modules only own the parameters, under T5X's names.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qmoe_jax.models.config import input_matrices

NORM_EPSILON = 1e-6
PRECISION = jax.lax.Precision.HIGHEST  # changes nothing for products of bfloat16
# Switch Transformer section 2.4: a tenth of the usual scale keeps the start of training stable.
INIT_SCALE = 0.1

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # T5X: the tanh form
    "linear": lambda x: x,
}


def kernel_init(
    distribution: Literal["normal", "truncated_normal"] = "normal", stack_axes: tuple[int, ...] = ()
) -> nn.initializers.Initializer:
    """Fan-in initializer for a kernel `[..., in, out]`, each of a stack drawn as if alone."""
    return nn.initializers.variance_scaling(
        INIT_SCALE, "fan_in", distribution, batch_axis=stack_axes
    )


def matmul(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`a @ b`, in full precision where both are float32: GPUs would else round them to TF32."""
    return jnp.matmul(a, b, precision=PRECISION)


def rms_norm(
    x: Float[Array, "... D"], scale_D: Float[Array, " D"], dtype: DTypeLike
) -> Float[Array, "... D"]:
    """Root-mean-square norm in float32, rounded to `dtype` before the scale (T5X: T5LayerNorm)."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normed = (x * jax.lax.rsqrt(mean_square + NORM_EPSILON)).astype(dtype)
    return normed * jnp.expand_dims(scale_D.astype(dtype), range(x.ndim - 1))


def add_residual(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x + y` in the wider of the two dtypes: float32 from the first sparse layer on."""
    dtype = max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return x.astype(dtype) + y.astype(dtype)


def zero_padding(x_BLD: Float[Array, "B L D"], valid_BL: Array) -> Float[Array, "B L D"]:
    """`x` with the rows of padding positions multiplied by 0 (T5X: logit_mask)."""
    return x_BLD * valid_BL[:, :, None].astype(x_BLD.dtype)


def activate(
    activations: tuple[str, ...], projections: Sequence[Float[Array, "*shape"]]
) -> Float[Array, "*shape"]:
    """Product of the activated projections: `relu(a)`, or `gelu(a) * b` for a gated MLP.

    Raises:
      ValueError: an activation is not one of relu, gelu, linear.
    """
    for name in activations:
        if name not in _ACTIVATIONS:
            raise ValueError(
                f"`mlp_activations` has {name!r}; known are {', '.join(_ACTIVATIONS)}."
            )
    branches = (_ACTIVATIONS[name](x) for name, x in zip(activations, projections, strict=True))
    return functools.reduce(jnp.multiply, branches)


def embed_tokens(
    embedding_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], dtype: DTypeLike
) -> Float[Array, "B L D"]:
    """Plain lookup, unscaled; a token outside the vocabulary becomes NaN."""
    return jnp.take(embedding_VD, tokens_BL, axis=0, mode="fill").astype(dtype)


def tied_logits(
    embedding_VD: Float[Array, "V D"], x_BLD: Float[Array, "B L D"]
) -> Float[Array, "B L V"]:
    """Logits through the token embedding, in float32, divided by sqrt(D) after the product."""
    logits_BLV = matmul(x_BLD.astype(jnp.float32), embedding_VD.astype(jnp.float32).T)
    return logits_BLV / math.sqrt(embedding_VD.shape[1])


def untied_logits(
    kernel_DV: Float[Array, "D V"], x_BLD: Float[Array, "B L D"]
) -> Float[Array, "B L V"]:
    """Logits through a matrix of their own, in float32, not rescaled."""
    return matmul(x_BLD.astype(jnp.float32), kernel_DV.astype(jnp.float32))


class Kernel(nn.Module):
    """The parameter `kernel` of a given shape, for callers that multiply by it themselves."""

    shape: tuple[int, ...]
    init_fn: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", self.init_fn, self.shape, jnp.float32)


class Dense(nn.Module):
    """`x @ kernel` in `dtype`, no bias; kernel `[in, out]`."""

    features: int
    dtype: DTypeLike
    init_fn: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... R"]:
        shape = (x.shape[-1], self.features)
        kernel_CR = self.param("kernel", self.init_fn, shape, jnp.float32)
        return matmul(x.astype(self.dtype), kernel_CR.astype(self.dtype))


class RmsNorm(nn.Module):
    """`rms_norm` with its parameter `scale`."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale_D, self.dtype)


class TokenEmbedder(nn.Module):
    """The table shared by both stacks and, in tied models, by the logits."""

    vocab_size: int
    emb_dim: int
    dtype: DTypeLike

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (self.vocab_size, self.emb_dim), jnp.float32
        )

    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return embed_tokens(self.embedding, tokens_BL, self.dtype)

    def logits(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """`tied_logits` with this table."""
        return tied_logits(self.embedding, x_BLD)


class Mlp(nn.Module):
    """The feed-forward sub-layer of a dense layer: `wi` (gated: `wi_0`, `wi_1`), then `wo`."""

    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], *, enable_dropout: bool = False
    ) -> Float[Array, "B L D"]:
        init = kernel_init("truncated_normal")
        hidden_BLF = activate(
            self.activations,
            [
                Dense(self.mlp_dim, self.dtype, init, name=name)(x_BLD)
                for name in input_matrices(self.activations)
            ],
        )
        dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))  # one mask for all positions
        hidden_BLF = dropout(hidden_BLF, deterministic=not enable_dropout)
        return Dense(x_BLD.shape[-1], self.dtype, init, name="wo")(hidden_BLF)
