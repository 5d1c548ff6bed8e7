# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every format as T5X's: the same arrays, in T5X's layout, all of it or nothing."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import tiny_stores
import tiny_switch
from tiny_stores import Kind

from qmoe_jax.checkpoints import huggingface_writer, source, t5x, t5x_export
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.models import config as configs

KINDS = [
    Kind("qmoe"),
    Kind("qmoe", config=tiny_stores.GATED),
    Kind("uniform", 3, 32),
    Kind("dense", dtype=ml_dtypes.bfloat16),
]


def assert_same(found, expected, dtype):
    """Every parameter, cast once."""
    found, expected = source.all_params(found), source.all_params(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array.astype(dtype), strict=True, err_msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.codec}-{kind.bits}")
def test_packed_checkpoints_come_back_dequantized(kind, tmp_path):
    """And with their step."""
    tiny_stores.write(tmp_path / "store", kind)
    packed = source.open_source(tmp_path / "store")
    for dtype in ("float32", "bfloat16"):
        folder = t5x_export.save(tmp_path / dtype, packed, dtype)
        assert folder == tmp_path / dtype / "checkpoint_7"
        exported = source.open_source(tmp_path / dtype)
        assert (exported.format, exported.step) == ("t5x", 7)
        assert_same(exported, packed, np.dtype(dtype))


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_every_expert_is_a_chunk(name, tmp_path):
    original = source.open_source(tiny_switch.DATA / name / "legacy")
    t5x_export.save(tmp_path, original, "float32")
    exported = source.open_source(tmp_path)
    assert exported.step == original.step
    assert_same(exported, original, np.float32)
    checkpoint = t5x.open_checkpoint(tmp_path)
    shapes = configs.param_shapes(original.config)
    experts = [path for path in shapes if "/mlp/expert/" in path]
    assert experts
    for path in experts:
        assert t5x.chunk_shape(checkpoint, path) == (1, *shapes[path][1:])


def test_hugging_face_becomes_step_0(tmp_path):
    original = source.open_source(tiny_switch.DATA / "tiny_switch_base" / "legacy")
    huggingface_writer.save(tmp_path / "hf", original, "float32")
    folder = t5x_export.save(tmp_path / "t5x", source.open_source(tmp_path / "hf"), "float32")
    assert folder.name == "checkpoint_0"
    assert_same(source.open_source(tmp_path / "t5x"), original, np.float32)


def test_experts_go_group_by_group(tmp_path, monkeypatch):
    """By bytes: of these, one expert has 4 * (35 * 41 + 41 * 35) in float32."""
    tiny_stores.write(tmp_path / "store", Kind("dense"))
    packed = source.open_source(tmp_path / "store")
    sizes = [g.stop - g.start for _, g in source.expert_arrays(packed, group_bytes=11_480)]
    assert sizes == [1] * 6
    sizes = [g.stop - g.start for _, g in source.expert_arrays(packed, group_bytes=22_960)]
    assert sizes == [2, 1, 2, 1]
    assert len(list(source.expert_arrays(packed, group_bytes=1))) == 6


def test_nothing_remains_of_an_export_that_fails(tmp_path):
    tiny_stores.write(tmp_path / "store", Kind("qmoe"))
    packed = source.open_source(tmp_path / "store")

    def failing(error):
        def groups(stack, layer, group_size):
            for group in packed.expert_groups(stack, layer, group_size):
                if stack == "decoder":
                    error(group)
                yield group

        return dataclasses.replace(packed, expert_groups=groups)

    def is_nan(group):
        group.arrays["wo"] = np.full_like(group.arrays["wo"], np.nan)

    def interrupted(group):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"`decoder/layers_0/mlp/expert/wo` of .* holds NaN"):
        t5x_export.save(out, failing(is_nan), "float32")
    assert not list(out.iterdir())
    with pytest.raises(KeyboardInterrupt):
        t5x_export.save(out, failing(interrupted), "float32")
    assert not list(out.iterdir())
    t5x_export.save(out, packed, "bfloat16")
    with pytest.raises(CheckpointError, match="checkpoint_7 exists already"):
        t5x_export.save(out, packed, "float32")
    assert [path.name for path in out.iterdir()] == ["checkpoint_7"]
