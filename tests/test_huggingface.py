# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: read as T5X, in every file form; what is wrong with one is said at once."""

import hashlib
import json

import numpy as np
import pytest
import tiny_switch
import torch_files

from qmoe_jax.checkpoints import huggingface, huggingface_writer, safetensors, source
from qmoe_jax.checkpoints.errors import CheckpointError

EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_5.wi.weight"


def stored(folder):
    """A folder's tensors as they are stored, copies and all."""
    tensors = safetensors.read_header(folder / "model.safetensors")
    return {name: safetensors.read_tensor(tensor) for name, tensor in tensors.items()}


def write(folder, arrays, **settings):
    """A folder of one safetensors file of float32."""
    folder.mkdir(exist_ok=True)
    shapes = {name: array.shape for name, array in arrays.items()}
    (folder / "model.safetensors").unlink(missing_ok=True)
    with safetensors.create(folder / "model.safetensors", shapes, np.dtype(np.float32)) as add:
        for name, array in arrays.items():
            add(name, array)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "switch_transformers"} | settings)
    )


def check_params(folder, name):
    found = source.all_params(source.open_source(folder))
    expected = tiny_switch.flat_params(name)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, strict=True, err_msg=path)


@pytest.fixture(scope="module", params=["tiny_switch_base", "tiny_switch_c"])
def exported(request, tmp_path_factory):
    """Tied logits and every second layer sparse; untied and every layer."""
    original = source.open_source(tiny_switch.DATA / request.param / "legacy")
    folder = tmp_path_factory.mktemp("export") / "model"
    return request.param, huggingface_writer.save(folder, original, "float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The stored tensors of one small model."""
    original = source.open_source(tiny_switch.DATA / "tiny_switch_base" / "legacy")
    folder = tmp_path_factory.mktemp("base") / "model"
    return stored(huggingface_writer.save(folder, original, "float32"))


def test_reads_what_transformers_saved(data_dir):
    """Digests of the same model's parameters as a T5X tree."""
    trained = data_dir / "qmoe" / "trained"
    opened = source.open_source(trained)
    params = source.all_params(opened)
    found = {name: hashlib.sha256(x.tobytes()).hexdigest()[:16] for name, x in params.items()}
    assert found == json.loads((trained / "digests.json").read_text())
    assert (opened.format, opened.step) == ("huggingface", None)
    assert opened.nbytes == sum(array.nbytes for array in params.values())


def test_experts_in_several_groups_and_at_once(exported):
    name, folder = exported
    opened, path = source.open_source(folder), "encoder/layers_1/mlp/expert/wi/kernel"
    groups = list(opened.expert_groups("encoder", 1, 3))
    assert [(group.start, group.stop) for group in groups] == [(0, 3), (3, 6), (6, 8)]
    expected = tiny_switch.flat_params(name)[path]
    np.testing.assert_array_equal(
        np.concatenate([group.arrays["wi"] for group in groups]), expected
    )
    np.testing.assert_array_equal(opened.read([path])[path], expected)
    with pytest.raises(CheckpointError, match=r"has no parameter .*Did you mean `encoder/layers_"):
        opened.read(["encoder/layers_1/mlp/wi_0/kernel"])


def test_reads_torch_files(exported, tmp_path):
    name, folder = exported
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    arrays = stored(folder)
    torch_files.write_state_dict(tmp_path / "pytorch_model.bin", arrays)
    check_params(tmp_path, name)
    torch_files.write(tmp_path / "pytorch_model.bin", {"model": {}}, {})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds no dict of tensors"):
        source.open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    halves = {"a.bin": list(arrays)[::2], "b.bin": list(arrays)[1::2]}
    for file, names in halves.items():
        torch_files.write_state_dict(tmp_path / file, {name: arrays[name] for name in names})
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check_params(tmp_path, name)


def test_the_converted_logits_have_a_name_of_their_own(base, tmp_path):
    logits = np.ones((512, 64), np.float32)
    write(tmp_path, base | {"decoder.lm_head.weight": logits})
    opened = source.open_source(tmp_path)
    assert not opened.config.logits_via_embedding
    (found,) = opened.read(["decoder/logits_dense/kernel"]).values()
    np.testing.assert_array_equal(found, logits.T)
    write(tmp_path, base | {"lm_head.weight": logits})
    assert source.open_source(tmp_path).config.logits_via_embedding
    write(tmp_path, base | {"lm_head.weight": logits}, tie_word_embeddings=False)
    assert not source.open_source(tmp_path).config.logits_via_embedding


def test_the_configuration_decides_what_shapes_do_not(base, tmp_path):
    write(tmp_path, base, relative_attention_max_distance=64)
    assert source.open_source(tmp_path).config.relpos_max_distance == 64


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon"),
        ({"relative_attention_max_distance": "far"}, "relative_attention_max_distance"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_models_that_compute_something_else(settings, named, base, tmp_path):
    write(tmp_path, base, **settings)
    with pytest.raises(CheckpointError, match=f"config.json says .*`{named}`"):
        source.open_source(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({EXPERT: None}, f"`{EXPERT}` of .* is missing"),
        ({EXPERT: np.zeros((64, 128), np.float32)}, f"`{EXPERT}` .* unlike the layer's other"),
        ({"encoder.final_layer_norm.weight": None}, "encoder/encoder_norm/scale"),
        ({"classifier.bias": np.zeros(2, np.float32)}, "classifier.bias"),
        ({"decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros(3)}, "query/kernel"),
        (dict.fromkeys(huggingface.EMBEDDINGS), "token_embedder/embedding"),
    ],
)
def test_tensors_missing_left_over_or_misshapen(changes, message, base, tmp_path):
    arrays = {name: array for name, array in (base | changes).items() if array is not None}
    write(tmp_path, arrays)
    with pytest.raises(CheckpointError, match=message):
        source.open_source(tmp_path)


def test_quantized_tensors(base, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers"}')
    arrays = base | {EXPERT.replace("_5", f"_{e}"): base[EXPERT].astype(np.int16) for e in range(8)}
    torch_files.write_state_dict(tmp_path / "pytorch_model.bin", arrays)
    with pytest.raises(CheckpointError, match="is int16; expected float32"):
        source.open_source(tmp_path)


def test_damaged_folders(exported, tmp_path):
    folder = tmp_path / "model"
    original = source.open_source(tiny_switch.DATA / exported[0] / "legacy")
    huggingface_writer.save(folder, original, "float32", max_shard_bytes=700_000)
    check_params(folder, exported[0])
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            source.open_source(folder)

    second.rename(tmp_path / "away")
    refused(rf"model\.safetensors\.index\.json names the file {second.name}, which is not there")
    second.write_bytes((tmp_path / "away").read_bytes()[:-1])
    refused(rf"{second.name} is no safetensors file")
    second.write_bytes(first.read_bytes())
    refused(rf"is in {second.name}, which does not hold it")
    (tmp_path / "away").replace(second)
    for bad in ("../model.safetensors", 7, "", "x" * 300):
        changed = {"weight_map": index["weight_map"] | {"shared.weight": bad}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
        refused("`shared.weight` is in .* no file")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(r"index\.json is no JSON")
    (folder / "model.safetensors.index.json").unlink()
    refused("no weights: expected one of model.safetensors")


def test_folders_of_other_models(base, tmp_path):
    write(tmp_path, base, model_type="t5")
    with pytest.raises(CheckpointError, match="`model_type` is t5; expected switch_transformers"):
        source.open_source(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
        source.open_source(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither a T5X checkpoint"):
        source.open_source(tmp_path)
