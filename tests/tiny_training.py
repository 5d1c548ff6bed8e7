# SPDX-License-Identifier: Apache-2.0
"""A Switch Transformer that trains in seconds, and text for it."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import tiny_switch
import tiny_tokenizers

from qmoe_jax.calibration import tokenizer
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.training import step
from qmoe_jax.training.batches import Batch, TrainingText
from qmoe_jax.training.loss import Loss
from qmoe_jax.training.optimizer import Optimizer
from qmoe_jax.training.program import Recipe

MODEL = SwitchConfig(
    vocab_size=256,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    expert_mlp_dim=20,
    num_encoder_layers=2,
    num_decoder_layers=1,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(0,),
    num_experts=4,
)
DROPPING = dataclasses.replace(  # and quick to compile
    MODEL,
    num_encoder_layers=1,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(),
    dropout_rate=0.1,
    expert_dropout_rate=0.2,
)
OPTIMIZER = Optimizer(schedule="constant", learning_rate=0.05, warmup_steps=2)


def text(folder: pathlib.Path) -> TrainingText:
    """Text to train and to validate on, written into `folder` with its tokenizer."""
    model = tiny_tokenizers.sentencepiece_model()
    (folder / "sentencepiece.model").write_bytes(tokenizer.with_sentinels(model, 32))
    (folder / "train.txt").write_text("\n".join(tiny_tokenizers.SENTENCES[:500]))
    (folder / "heldout.txt").write_text("\n".join(tiny_tokenizers.SENTENCES[500:]))
    return TrainingText(
        sentencepiece_model_file=str(folder / "sentencepiece.model"),
        files=str(folder / "train.txt"),
        validation_files=str(folder / "heldout.txt"),
        task_feature_lengths={"inputs": 24},
    )


def recipe(**changes: Any) -> Recipe:
    settings = {
        "model": DROPPING,
        "optimizer": OPTIMIZER,
        "loss": Loss(),
        "train_steps": 6,
        "batch_size": 8,
        "capacity": "none",
        "random_seed": 0,
    }
    return Recipe(**(settings | changes))


@functools.cache
def params(model: SwitchConfig = MODEL, seed: int = 0) -> Any:
    """Random parameters."""
    return tiny_switch.quick_jit(step.new_params, static_argnums=(0, 1))(model, seed)


def batch(rows: int = 8, inputs: int = 12, targets: int = 6, seed: int = 0) -> Batch:
    """Random tokens; each row ends in padding of its own length."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        drawn = rng.integers(1, MODEL.vocab_size, (rows, length), np.int32)
        ends = rng.integers(2, length + 1, (rows, 1))
        return np.where(np.arange(length) < ends, drawn, 0).astype(np.int32)

    wanted = tokens(targets)
    shifted = np.pad(wanted, ((0, 0), (1, 0)))[:, :-1]
    return Batch(tokens(inputs), shifted, wanted)
