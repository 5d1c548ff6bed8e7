# SPDX-License-Identifier: Apache-2.0
"""The sizes of a Switch Transformer, and the T5X parameter tree that they imply.

Shape suffixes, used in every numeric body of this package (`W_ERC`, `x_ND`):

    E experts       R rows out      C columns in    N tokens        B batch         L length
    H heads         D model         F feed-forward  V vocabulary    K codewords

Inside attention, `K` is the width of one head and `S` the length attended to; inside routing, `G`
groups hold `T` tokens each.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Stack: TypeAlias = Literal["encoder", "decoder"]

STACKS: tuple[Stack, Stack] = ("encoder", "decoder")
ATTENTIONS: dict[Stack, tuple[tuple[str, str], ...]] = {
    # (attention module, its layer norm), in the order in which a layer applies them
    "encoder": (("attention", "pre_attention_layer_norm"),),
    "decoder": (
        ("self_attention", "pre_self_attention_layer_norm"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm"),
    ),
}

_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.*)")
_NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """Sizes and constants of one model; the names are those of T5X where it has one.

    Everything but the last two groups of fields can be read from parameter shapes.
    """

    vocab_size: int  # rows of token_embedder (32128: padded), not the tokenizer's size
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int  # of the dense MLPs; equals expert_mlp_dim when every layer is sparse
    expert_mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    encoder_sparse_layers: tuple[int, ...]  # indices of sparse layers
    decoder_sparse_layers: tuple[int, ...]
    num_experts: int
    mlp_activations: tuple[str, ...] = ("relu",)  # ("gelu", "linear"): gated, kernels wi_0, wi_1
    logits_via_embedding: bool = True
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128
    # routing capacity, used only under the "t5x" rule
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    group_size: int = 8192
    dropout_rate: float = 0.0
    expert_dropout_rate: float = 0.0


def sparse_layers(config: SwitchConfig, stack: Stack) -> tuple[int, ...]:
    """Indices of the layers of `stack` whose MLP is a set of experts."""
    return config.encoder_sparse_layers if stack == "encoder" else config.decoder_sparse_layers


def sparse_places(config: SwitchConfig) -> tuple[tuple[Stack, int], ...]:
    """Stack and index of all sparse layers, in the order in which the model applies them."""
    return tuple((stack, layer) for stack in STACKS for layer in sparse_layers(config, stack))


def num_layers(config: SwitchConfig, stack: Stack) -> int:
    """Number of layers of `stack`, dense and sparse."""
    return config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers


def last_sparse_layer(config: SwitchConfig) -> tuple[Stack, int]:
    """The sparse layer that the model applies last."""
    if config.decoder_sparse_layers:
        return "decoder", max(config.decoder_sparse_layers)
    return "encoder", max(config.encoder_sparse_layers)


def input_matrices(activations: tuple[str, ...]) -> tuple[str, ...]:
    """Names of an MLP's input kernels, one for each activation: `wi`, or `wi_0` and `wi_1`."""
    if len(activations) == 1:
        return ("wi",)
    return tuple(f"wi_{i}" for i in range(len(activations)))


def expert_matrices(config: SwitchConfig) -> tuple[str, ...]:
    """Names of one expert's matrices: `("wi", "wo")`, gated `("wi_0", "wi_1", "wo")`."""
    return (*input_matrices(config.mlp_activations), "wo")


def layer_shapes(config: SwitchConfig, stack: Stack, layer: int) -> dict[str, Shape]:
    """Path below `{stack}/layers_{layer}/` -> shape, for every parameter of one layer."""
    D, width = config.emb_dim, config.num_heads * config.head_dim
    shapes: dict[str, Shape] = {}
    for attention, norm in ATTENTIONS[stack]:
        shapes[f"{norm}/scale"] = (D,)
        for projection in ("query", "key", "value"):
            shapes[f"{attention}/{projection}/kernel"] = (D, width)
        shapes[f"{attention}/out/kernel"] = (width, D)
    shapes["pre_mlp_layer_norm/scale"] = (D,)
    sparse = layer in sparse_layers(config, stack)
    F = config.expert_mlp_dim if sparse else config.mlp_dim
    folder, stacked = ("mlp/expert", (config.num_experts,)) if sparse else ("mlp", ())
    if sparse:
        shapes["mlp/router/router_weights/w/kernel"] = (D, config.num_experts)
    for name in expert_matrices(config):
        shapes[f"{folder}/{name}/kernel"] = (*stacked, *((F, D) if name == "wo" else (D, F)))
    return shapes


def outer_paths(config: SwitchConfig) -> list[str]:
    """T5X paths of the parameters outside of all layers."""
    return [path for path in param_shapes(config) if "/layers_" not in path]


def dense_paths(config: SwitchConfig, stack: Stack, layer: int) -> list[str]:
    """T5X paths of one layer's parameters that are no experts."""
    shapes = layer_shapes(config, stack, layer)
    return [
        f"{stack}/layers_{layer}/{name}" for name in shapes if not name.startswith("mlp/expert/")
    ]


def param_shapes(config: SwitchConfig) -> dict[str, Shape]:
    """The whole parameter tree: T5X path without `target/` -> shape.

    Axis orders are those of T5X: kernels [in, out], heads folded into one axis (head-major),
    experts on axis 0, position biases [heads, buckets].
    """
    D, V = config.emb_dim, config.vocab_size
    shapes: dict[str, Shape] = {"token_embedder/embedding": (V, D)}
    for stack in STACKS:
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (config.num_heads, config.relpos_num_buckets)
        for layer in range(num_layers(config, stack)):
            prefix = f"{stack}/layers_{layer}"
            for path, shape in layer_shapes(config, stack, layer).items():
                shapes[f"{prefix}/{path}"] = shape
        shapes[f"{stack}/{stack}_norm/scale"] = (D,)
    if not config.logits_via_embedding:
        shapes["decoder/logits_dense/kernel"] = (D, V)
    return shapes


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> SwitchConfig:
    """Derives every size from the shapes of a checkpoint's parameters.

    What shapes cannot tell keeps its default: the capacity constants (they are gin settings and
    differ between released models), dropout rates, `relpos_max_distance`. Two input kernels mean
    the gated gelu of T5 1.1, one means relu.

    Args:
      shapes: T5X path without `target/`, with slashes, e.g. `encoder/encoder_norm/scale`, -> shape.

    Raises:
      ValueError: an array is missing, has another shape, or does not belong to a Switch
        Transformer; or no layer has experts (plain T5).
    """
    V, D = _require(shapes, "token_embedder/embedding", ("vocabulary", "emb_dim"))
    H, buckets = _require(shapes, "encoder/relpos_bias/rel_embedding", ("heads", "buckets"))
    query = "encoder/layers_0/attention/query/kernel"
    _, width = _require(shapes, query, ("emb_dim", "heads * head_dim"))
    if H == 0 or width % H:
        raise ValueError(
            f"`{query}` has {width} columns, which {H} heads (rows of "
            "`encoder/relpos_bias/rel_embedding`) do not divide."
        )
    sparse: dict[Stack, tuple[int, ...]] = {
        stack: tuple(_layers(shapes, stack, with_experts=True)) for stack in STACKS
    }
    depth = {stack: _depth(shapes, stack) for stack in STACKS}
    gated = any(path.endswith("/wi_0/kernel") for path in shapes)
    E, mlp_dim, expert_mlp_dim = _mlp_sizes(shapes, sparse, "wi_0" if gated else "wi")
    config = SwitchConfig(
        vocab_size=V,
        emb_dim=D,
        num_heads=H,
        head_dim=width // H,
        mlp_dim=mlp_dim,
        expert_mlp_dim=expert_mlp_dim,
        num_encoder_layers=depth["encoder"],
        num_decoder_layers=depth["decoder"],
        encoder_sparse_layers=sparse["encoder"],
        decoder_sparse_layers=sparse["decoder"],
        num_experts=E,
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
        relpos_num_buckets=buckets,
    )
    _check_shapes(shapes, param_shapes(config))
    return config


def _require(shapes: Mapping[str, Shape], path: str, axes: tuple[str, ...]) -> Shape:
    if path not in shapes:
        raise ValueError(
            f"Not a Switch Transformer: the array `{path}` is missing. Parameter paths must be "
            "T5X's, with slashes and without the prefix `target/`."
        )
    shape = tuple(shapes[path])
    if len(shape) != len(axes):
        raise ValueError(f"`{path}` should have the axes [{', '.join(axes)}], got shape {shape}.")
    return shape


def _layers(shapes: Iterable[str], stack: str, with_experts: bool | None = None) -> Iterator[int]:
    """Indices, ascending, of the layers of one stack: all, or those with (without) experts."""
    rests: dict[int, list[str]] = {}
    for path in shapes:
        match = _LAYER.fullmatch(path)
        if match and match[1] == stack:
            rests.setdefault(int(match[2]), []).append(match[3])
    for layer, paths in sorted(rests.items()):
        has_experts = any(path.startswith("mlp/expert/") for path in paths)
        if with_experts is None or with_experts == has_experts:
            yield layer


def _depth(shapes: Iterable[str], stack: str) -> int:
    """Number of layers of one stack; the indices must be 0, 1, 2 and so on."""
    layers = list(_layers(shapes, stack))
    for expected, layer in enumerate(layers):
        if layer != expected:
            raise ValueError(
                f"`{stack}/layers_{expected}/...` is missing, but layer {layer} is not."
            )
    return len(layers)


def _mlp_sizes(
    shapes: Mapping[str, Shape], sparse: Mapping[Stack, tuple[int, ...]], matrix: str
) -> tuple[int, int, int]:
    """Experts, width of the dense MLPs, width of the experts: from the first layer of each kind."""
    experts = [f"{s}/layers_{i}/mlp/expert/{matrix}/kernel" for s in STACKS for i in sparse[s]]
    if not experts:
        raise ValueError(
            "A dense model (plain T5): no layer has experts (`mlp/expert/...`). Only Switch "
            "Transformers, whose sparse layers hold experts, can be loaded."
        )
    E, _, expert_mlp_dim = _require(shapes, experts[0], ("experts", "emb_dim", "mlp_dim"))
    dense = [
        f"{stack}/layers_{layer}/mlp/{matrix}/kernel"
        for stack in STACKS
        for layer in _layers(shapes, stack, with_experts=False)
    ]
    if not dense:
        return E, expert_mlp_dim, expert_mlp_dim
    return E, _require(shapes, dense[0], ("emb_dim", "mlp_dim"))[1], expert_mlp_dim


def _check_shapes(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raises a ValueError that names the arrays by which the two trees differ."""
    missing = [path for path in expected if path not in shapes]
    if missing:
        raise ValueError(f"Arrays of a Switch Transformer are missing: {_listed(missing)}.")
    for path, shape in expected.items():
        if tuple(shapes[path]) != shape:
            raise ValueError(
                f"`{path}` should have shape {shape} (from the other arrays), "
                f"got {tuple(shapes[path])}."
            )
    extra = [path for path in shapes if path not in expected]
    if extra:
        raise ValueError(f"Arrays that a Switch Transformer does not have: {_listed(extra)}.")


def _listed(paths: list[str]) -> str:
    shown = ", ".join(f"`{path}`" for path in paths[:_NAMES_SHOWN])
    rest = len(paths) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
