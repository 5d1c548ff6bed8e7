# SPDX-License-Identifier: Apache-2.0
"""Exported folders: the same parameters, transformers' own logits, all of it or nothing."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_switch
from flax.traverse_util import unflatten_dict

from qmoe_jax.checkpoints import huggingface_writer, safetensors, source
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.models import switch


def original(name):
    return source.open_source(tiny_switch.DATA / name / "legacy")


@pytest.mark.parametrize("name", ["tiny_switch_base", "tiny_switch_c"])
def test_parameters_and_logits_come_back(name, tmp_path):
    folder = huggingface_writer.save(tmp_path / "x", original(name), "float32")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    opened = source.open_source(folder)
    assert opened.config == original(name).config
    params = source.all_params(opened)
    assert params.keys() == tiny_switch.flat_params(name).keys()
    for path, array in tiny_switch.flat_params(name).items():
        np.testing.assert_array_equal(params[path], array, strict=True, err_msg=path)
    model = tiny_switch.quick_jit(switch.Switch(opened.config).apply)
    tree = unflatten_dict({path: jnp.asarray(array) for path, array in params.items()}, sep="/")
    logits = np.asarray(model({"params": tree}, *tiny_switch.tokens(name, "nopad")))
    columns = tiny_switch.reference(name)["logit_columns"]
    with np.load(tiny_switch.DATA / name / "hf_logits.npz") as file:
        np.testing.assert_allclose(logits[..., columns], file["logits"], rtol=0, atol=1e-4)


def test_bfloat16_in_files_of_bounded_size(tmp_path):
    name = "tiny_switch_base"
    limit = 300_000
    folder = huggingface_writer.save(
        tmp_path / "x", original(name), "bfloat16", max_shard_bytes=limit
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    total = 0
    for file in files:
        tensors = safetensors.read_header(folder / file)
        assert tensors.keys() == {key for key, at in index["weight_map"].items() if at == file}
        nbytes = sum(2 * int(np.prod(tensor.shape)) for tensor in tensors.values())
        assert nbytes <= limit
        total += nbytes
    assert index["metadata"]["total_size"] == total
    params = source.all_params(source.open_source(folder))
    for path, array in tiny_switch.flat_params(name).items():
        np.testing.assert_array_equal(params[path], array.astype(ml_dtypes.bfloat16), strict=True)


def test_settings_that_transformers_needs(tmp_path):
    """Names and values as its configuration class has them; no expert's capacity is reached."""
    folder = huggingface_writer.save(tmp_path / "x", original("tiny_switch_base"), "float32")
    settings = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "d_ff": 128,
        "d_kv": 16,
        "d_model": 64,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "num_decoder_layers": 4,
        "num_experts": 8,
        "num_heads": 4,
        "num_layers": 4,
        "num_sparse_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "vocab_size": 512,
    }
    assert settings.items() >= expected.items()
    assert settings["expert_capacity"] >= 1_000_000


def test_gated_models_and_other_patterns_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"gated experts, which .* has no class for"):
        huggingface_writer.save(tmp_path / "x", original("tiny_switch_xxl"), "float32")
    base = original("tiny_switch_base")
    for changes, message in (
        ({"encoder_sparse_layers": (0, 2)}, r"encoder of .* layers \(0, 2\) of 4"),
        ({"decoder_sparse_layers": ()}, r"decoder of .* layers \(\) of 4"),
        ({"mlp_dim": 96}, "96 wide and its experts 128"),
    ):
        other = dataclasses.replace(base, config=dataclasses.replace(base.config, **changes))
        with pytest.raises(CheckpointError, match=message):
            huggingface_writer.save(tmp_path / "x", other, "float32")
    assert not list(tmp_path.iterdir())


def test_nothing_remains_of_an_export_that_fails(tmp_path):
    base = original("tiny_switch_base")

    def damaged(stack, layer, group_size):
        for group in base.expert_groups(stack, layer, group_size):
            arrays = {name: np.full_like(array, np.nan) for name, array in group.arrays.items()}
            yield dataclasses.replace(group, arrays=arrays)

    with pytest.raises(CheckpointError, match=r"`encoder/layers_1/mlp/expert/wi` .* holds NaN"):
        huggingface_writer.save(
            tmp_path / "x", dataclasses.replace(base, expert_groups=damaged), "float32"
        )
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        huggingface_writer.save(tmp_path / "x", base, "float32")
    with pytest.raises(CheckpointError, match="cannot write to gs:"):
        huggingface_writer.save("gs://bucket/x", base, "float32")
    with pytest.raises(ValueError, match="max_shard_bytes"):
        huggingface_writer.save(tmp_path / "y", base, "float32", max_shard_bytes=0)
