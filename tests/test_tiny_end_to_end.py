# SPDX-License-Identifier: Apache-2.0
"""The example that `make demo` runs."""

import importlib.util

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from qmoe_jax.calibration import tokenizer
from qmoe_jax.checkpoints import source, vocabulary
from qmoe_jax.inference import decoding, load, prompts
from qmoe_jax.inference.model import Model
from qmoe_jax.models.switch import Switch

PROMPTS = [f"The <extra_id_0> of {name} is <extra_id_1>." for name in dir(str)[-32:]]


def dequantized(path) -> Model:
    """The dense model that a packed checkpoint stands for."""
    opened = source.open_source(path)
    params = {name: jnp.asarray(a, jnp.float32) for name, a in source.all_params(opened).items()}
    return Model(Switch(opened.config), {"params": unflatten_dict(params, sep="/")})


def tokens(model: Model, path) -> list[list[int]]:
    """Greedy answers to some prompts."""
    words = tokenizer.load_tokenizer(vocabulary.kept(path))
    ((_, (ids,)),) = prompts.batches([prompts.encode(PROMPTS, words)[0]], len(PROMPTS))
    return decoding.generate(model, np.asarray(ids), 24)[0].tolist()


def test_the_example_runs_and_the_pack_has_the_loss_reported(request, tmp_path, capsys):
    path = request.config.rootpath / "examples" / "tiny_end_to_end.py"
    spec = importlib.util.spec_from_file_location("tiny_end_to_end", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(tmp_path / "out", samples=160, heldout_samples=64)
    assert losses["evaluated"] == losses["compressed"]
    assert set(losses) == {"original", "round_to_nearest", "compressed", "evaluated"}
    lost = losses["round_to_nearest"] - losses["original"]
    assert lost > 0.05  # the model is trained well enough to be hurt
    assert abs(losses["compressed"] - losses["original"]) < 0.5 * lost
    pack = tmp_path / "out"
    assert tokens(load.load(pack), pack) == tokens(dequantized(pack), pack)
    printed = capsys.readouterr().out
    assert "as written" in printed and "round to nearest" in printed
