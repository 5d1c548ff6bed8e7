# SPDX-License-Identifier: Apache-2.0
"""Compares the released switch-base-8 with what is publicly known of it.

    make check-real CHECKPOINT=gs://t5-data/pretrained_models/t5x/moe/switch_classic/base/e8/checkpoint_500100

Reads the checkpoint in place (2.5 GB; no credentials are needed for that bucket), computes the
decoder's first output for a batch of ones and fills the gaps of two sentences. The figures are
those of Hugging Face's integration test of the same weights (transformers,
test_modeling_switch_transformers.py: test_small_logits, test_small_generate), computed there in
bfloat16. Their model drops no token here, so ours does not either.
"""

import argparse
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from qmoe_jax.calibration import tokenizer
from qmoe_jax.calibration.tokenizer import Tokenizer
from qmoe_jax.checkpoints import kvstore, source
from qmoe_jax.inference import decoding, spans
from qmoe_jax.inference.model import Model
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.switch import Switch, decoder_masks

VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
BASE_8 = SwitchConfig(
    vocab_size=32128,
    emb_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=3072,
    expert_mlp_dim=3072,
    num_encoder_layers=12,
    num_decoder_layers=12,
    encoder_sparse_layers=(1, 3, 5, 7, 9, 11),
    decoder_sparse_layers=(1, 3, 5, 7, 9, 11),
    num_experts=8,
)
# The first 30 numbers of the decoder's output, normed, for 32 x 64 ones on both sides.
EXPECTED = np.array(
    [
        *(-0.204102, -0.193359, 0.523438, -0.296875, 0.108887, 0.0211182, 0.605469, -0.100586),
        *(-0.0551758, 0.296875, 0.0090332, 0.174805, 0.139648, -0.170898, -0.0981445, 0.0245361),
        *(0.0373535, 0.050293, -0.212891, 0.129883, 0.390625, -0.203125, -0.122559, -0.180664),
        *(0.0437012, -0.349609, -0.0250244, -0.104004, -0.15918, -0.133789),
    ]
)
TOLERANCE = 0.03  # bfloat16 there, float32 here
SENTENCES = {
    "The human walks into a bar and orders a <extra_id_0>": "drink",
    "A <extra_id_0> walks into a bar and orders a <extra_id_1> with <extra_id_2> pinch of "
    "<extra_id_3>.": "man",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares a released switch-base-8")
    parser.add_argument("checkpoint", help="path or URL of T5X's checkpoint")
    parser.add_argument("--sentencepiece_model_file", default=VOCABULARY, help="path or URL")
    given = parser.parse_args(arguments)
    opened = source.open_source(given.checkpoint)
    if opened.config != BASE_8:
        print(f"{opened.path} is no switch-base-8: {opened.config}", file=sys.stderr)
        return 1
    vocabulary = load_vocabulary(given.sentencepiece_model_file)
    flat = {k: jnp.asarray(v, jnp.float32) for k, v in source.all_params(opened).items()}
    params = unflatten_dict(flat, sep="/")
    ones = np.ones((1, 64), np.int32)  # every row of the 32 is the same
    found = np.asarray(decoder_output(opened.config, params, ones, ones)[0, 0, : len(EXPECTED)])
    difference = np.abs(found - EXPECTED).max()
    sound = difference <= TOLERANCE
    print(f"decoder's output: differs by {difference:.4f} at most, {TOLERANCE} is allowed")
    for sentence, first in SENTENCES.items():
        filled = fill(opened.config, params, vocabulary, sentence)
        print(filled)
        sound &= f"[{first}" in filled
    print("as published" if sound else "NOT as published")
    return 0 if sound else 1


def load_vocabulary(path: str) -> Tokenizer:
    """A SentencePiece model with its sentinels, from a file or a URL."""
    folder, _, name = kvstore.location(path).rpartition("/")
    (content,) = kvstore.read_files(kvstore.open_store(folder), [name])
    if content is None:
        raise ValueError(f"there is no {path}; give --sentencepiece_model_file")
    with tempfile.TemporaryDirectory() as local:
        file = pathlib.Path(local, "sentencepiece.model")
        file.write_bytes(content)
        return tokenizer.load_tokenizer(file)


def decoder_output(
    config: SwitchConfig, params, inputs: np.ndarray, targets: np.ndarray
) -> Float[Array, "B L D"]:
    """The decoder's normed output where `targets` are its inputs, none of them padding."""

    inputs_BS, targets_BL = jnp.asarray(inputs), jnp.asarray(targets)

    def run(model: Switch):
        encoded = model.encode(inputs_BS)
        masks = decoder_masks(targets_BL, targets_BL, inputs_BS)
        return model.decoder(model.token_embedder(targets_BL), masks, encoded)

    model = Switch(config)
    return jax.jit(lambda params: model.apply({"params": params}, method=run))(params)


def fill(config: SwitchConfig, params, vocabulary: Tokenizer, sentence: str) -> str:
    """The sentence with its gaps filled greedily, in brackets."""
    ids: list[int] = []
    for part in re.split(r"(<extra_id_\d+>)", sentence):
        sentinel = re.fullmatch(r"<extra_id_(\d+)>", part)
        if sentinel:
            ids.append(vocabulary.first_sentinel_id - int(sentinel[1]))
        else:
            ids.extend(vocabulary.encode(part).tolist())
    tokens = np.array([*ids, vocabulary.eos_id], np.int32)
    model = Model(Switch(config), {"params": params})
    found, _ = decoding.generate(model, tokens[None], length=20, eos_id=vocabulary.eos_id)
    return spans.filled(tokens, found[0], vocabulary)


if __name__ == "__main__":
    sys.exit(main())
