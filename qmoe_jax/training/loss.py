# SPDX-License-Identifier: Apache-2.0
"""What training minimizes (T5X: models.py and losses.py; Switch Transformer, section 2.2)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from qmoe_jax.models.attention import decoder_masks
from qmoe_jax.models.routing import routing_plan
from qmoe_jax.models.switch import Switch
from qmoe_jax.training.batches import Batch

Metrics = dict[str, jax.Array]  # name -> float32 scalar


@dataclasses.dataclass(frozen=True)
class Loss:
    """Factors of the loss; the defaults are those of T5X's Switch Transformers.

    Attributes:
      z_loss: of the squared log-normalizer of the output logits.
      label_smoothing: probability that is spread over all other tokens.
      aux_loss_factor: of the load-balancing loss, averaged over sparse layers.
      router_z_loss_factor: of the router's z-loss, likewise.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    aux_loss_factor: float = 0.01
    router_z_loss_factor: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"LABEL_SMOOTHING is {self.label_smoothing}; expected 0 or more, below 1"
            )
        for name in ("z_loss", "aux_loss_factor", "router_z_loss_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name.upper()} is {getattr(self, name)}; expected 0 or more")


class TargetSums(NamedTuple):
    """Sums over the real targets of a batch, float32."""

    cross_entropy: Float[Array, ""]  # nats
    square_log_z: Float[Array, ""]
    correct: Float[Array, ""]  # targets that have the highest logit
    targets: Float[Array, ""]


def target_sums(
    logits_BLV: Float[Array, "B L V"],
    targets_BL: Int[Array, "B L"],
    label_smoothing: int | float = 0.0,
) -> TargetSums:
    """Sums for the loss over targets that are not 0.

    With smoothing `s`, the wanted distribution has 1 - s at the target and s / (V - 1) elsewhere;
    its entropy is subtracted, so that 0 stays the least (T5X: losses.py).
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    real_BL = (targets_BL > 0).astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    own_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    cross_entropy_BL = log_z_BL - own_BL
    if label_smoothing:
        V = logits_BLV.shape[-1]
        kept, spread = 1 - label_smoothing, label_smoothing / (V - 1)
        others_BL = jnp.sum(logits_BLV, axis=-1) - own_BL
        entropy = -(kept * math.log(kept) + (V - 1) * spread * math.log(spread))
        cross_entropy_BL = log_z_BL - kept * own_BL - spread * others_BL - entropy
    correct_BL = (jnp.argmax(logits_BLV, axis=-1) == targets_BL).astype(jnp.float32)
    return TargetSums(
        cross_entropy=jnp.sum(cross_entropy_BL * real_BL),
        square_log_z=jnp.sum(jnp.square(log_z_BL) * real_BL),
        correct=jnp.sum(correct_BL * real_BL),
        targets=jnp.sum(real_BL),
    )


def training_loss(
    params: Mapping[str, Any],
    batch: Batch,
    model: Switch,
    factors: Loss,
    dropout_key: jax.Array,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch and what it is made of, with dropout as the model's config says.

    Sums over targets are divided by the number of real targets (T5X: NUM_REAL_TARGET_TOKENS). T5X
    multiplies the gradients of experts by the number of expert partitions; here they do not depend
    on how the model is laid out.

    Returns:
      The loss; metrics `loss`, `cross_entropy`, `z_loss`, `auxiliary_loss` and `router_z_loss`
      (without their factors), `accuracy`, `busiest_expert` (the largest share of a layer's tokens
      that one expert is given).
    """
    outputs: Any = model.apply(
        {"params": params},
        *batch,
        enable_dropout=True,
        rngs={"dropout": dropout_key},
        mutable=["intermediates"],
    )
    logits_BLV, sown = outputs
    sums = target_sums(logits_BLV, batch.decoder_target_tokens, factors.label_smoothing)
    targets = jnp.maximum(sums.targets, 1.0)
    by_path = flatten_dict(sown["intermediates"])
    metrics = {
        "cross_entropy": sums.cross_entropy / targets,
        "z_loss": sums.square_log_z / targets,
        "auxiliary_loss": _mean_sown(by_path, "auxiliary_loss"),
        "router_z_loss": _mean_sown(by_path, "router_z_loss"),
        "accuracy": sums.correct / targets,
        "busiest_expert": _busiest_share(by_path, batch, model),
    }
    loss = (
        metrics["cross_entropy"]
        + factors.z_loss * metrics["z_loss"]
        + factors.aux_loss_factor * metrics["auxiliary_loss"]
        + factors.router_z_loss_factor * metrics["router_z_loss"]
    )
    return loss, {"loss": loss, **metrics}


def evaluation_sums(params: Mapping[str, Any], batch: Batch, model: Switch) -> TargetSums:
    """Sums over a batch's targets, without dropout."""
    logits_BLV: Any = model.apply({"params": params}, *batch)
    return target_sums(logits_BLV, batch.decoder_target_tokens)


def _mean_sown(by_path: Mapping[tuple[str, ...], Any], name: str) -> Float[Array, ""]:
    values = [value for path, (value,) in by_path.items() if path[-1] == name]
    return jnp.mean(jnp.stack(values))


def _busiest_share(
    by_path: Mapping[tuple[str, ...], Any], batch: Batch, model: Switch
) -> Float[Array, ""]:
    """Padding, which is routed too, is left out; dropped tokens are nobody's."""
    valid = {
        "encoder": batch.encoder_input_tokens > 0,
        "decoder": decoder_masks(
            batch.decoder_input_tokens, batch.decoder_target_tokens, batch.encoder_input_tokens
        ).valid,
    }
    shares = []
    for path, (index_GT,) in by_path.items():
        if path[-1] == "expert_index":
            valid_BL = valid[path[0]]
            B, L = valid_BL.shape
            plan = routing_plan(model.config, B, L, model.capacity, training=True)
            padded = (B + plan.pad_batch, L + plan.pad_length)
            index_BL = index_GT.reshape(padded)[:B, :L]
            valid_BL = valid_BL.astype(jnp.float32)
            none_E = jnp.zeros(model.config.num_experts)
            tokens_E = none_E.at[index_BL].add(valid_BL, mode="drop")
            shares.append(jnp.max(tokens_E) / jnp.sum(valid_BL))
    return jnp.max(jnp.stack(shares))
