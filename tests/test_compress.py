# SPDX-License-Identifier: Apache-2.0
"""The loop on checkpoints that T5X wrote: what is stored is what was computed."""

import dataclasses
import io
import json

import numpy as np
import pytest
import rich.console

from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints import packed, source, t5x, t5x_writer
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.models import config as configs
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs import compress, evaluate

DEMO = "tests/data/text"


@pytest.fixture(scope="session")
def text(request):
    demo = request.config.rootpath / DEMO
    return Text(
        sentencepiece_model_file=str(demo / "sentencepiece.model"),
        files=str(demo / "calibration.jsonl"),
        validation_files=str(demo / "heldout.jsonl"),
        task_feature_lengths={"inputs": 64},
        document_mode="split",
    )


def checkpoint(data_dir, model):
    return str(data_dir / "t5x" / model / "legacy")


def run(path, output, text, *, compute=None, samples=32, **options):
    return compress.compress(
        str(path),
        str(output),
        text,
        compute=compress.Compute(**(compute or {})),
        num_samples=samples,
        num_validation_samples=8,
        console=rich.console.Console(file=io.StringIO()),
        **options,
    )


def loss_of(path, text):
    quiet = rich.console.Console(file=io.StringIO())
    return evaluate.evaluate(str(path), text, num_validation_samples=8, console=quiet)["loss"]


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.bin")}


@pytest.fixture(scope="session")
def compressed(data_dir, text, tmp_path_factory):
    """tiny_switch_base, ternary, all eight experts of a layer in one group."""
    output = tmp_path_factory.mktemp("compressed") / "base"
    path = checkpoint(data_dir, "tiny_switch_base")
    return output, run(path, output, text, compare_round_to_nearest=True)


def test_the_losses_reported_are_those_of_the_checkpoints(compressed, data_dir, text):
    output, report = compressed
    assert report.losses["compressed"] == loss_of(output, text)
    original = checkpoint(data_dir, "tiny_switch_base")
    assert report.losses["original"] == loss_of(original, text)
    assert set(report.losses) == {"original", "round_to_nearest", "compressed"}


@pytest.mark.parametrize("experts_per_group", [1, 3])
def test_every_group_size_gives_the_same_weights(
    experts_per_group, compressed, data_dir, text, tmp_path
):
    path = checkpoint(data_dir, "tiny_switch_base")
    compute = {"experts_per_group": experts_per_group}
    report = run(path, tmp_path / "out", text, compute=compute)
    assert report.losses["compressed"] == compressed[1].losses["compressed"]
    for stack in configs.STACKS:
        for layer in (1, 3):
            one, other = (
                packed.load_experts(packed.open_checkpoint(folder), stack, layer)
                for folder in (compressed[0], tmp_path / "out")
            )
            for name, record in one.items():
                np.testing.assert_array_equal(record.codes, other[name].codes)
                np.testing.assert_array_equal(record.row_values, other[name].row_values)


def test_group_sizes_do_not_matter_to_least_squares(data_dir, text, tmp_path):
    path, found = checkpoint(data_dir, "tiny_switch_base"), []
    for size in (8, 3):
        report = run(
            path,
            tmp_path / str(size),
            text,
            quantizer=Quantizer(grid="least_squares", penalty=0.1, sweeps=2),
            codec="tunstall",
            compute={"experts_per_group": size},
        )
        found.append((report.losses, [layer.matrices for layer in report.layers]))
        assert report.settings["quantizer"]["grid"] == "least_squares"
    assert found[0] == found[1]


def test_memory_mapped_buffers_and_a_second_run_give_the_same_bytes(
    compressed, data_dir, text, tmp_path
):
    path = checkpoint(data_dir, "tiny_switch_base")
    (tmp_path / "buffers").mkdir()
    compute = {"buffer_dir": str(tmp_path / "buffers")}
    run(path, tmp_path / "out", text, compute=compute, compare_round_to_nearest=True)
    assert files(tmp_path / "out") == files(compressed[0])
    assert not list((tmp_path / "buffers").iterdir())  # they go with the run


def test_report_counts_everything_that_is_stored(compressed):
    output, report = compressed
    stored = packed.open_checkpoint(output)
    layers = {(layer.stack, layer.layer): layer for layer in report.layers}
    assert list(layers) == [("encoder", 1), ("encoder", 3), ("decoder", 1), ("decoder", 3)]
    assert report.totals["packed_bytes"] == stored.nbytes
    assert stored.nbytes == sum(f.stat().st_size for f in output.rglob("*.bin"))
    tokens = report.samples["calibration"]
    for (stack, _), layer in layers.items():
        assert sum(layer.tokens) == tokens[f"{stack}_tokens"]
        assert all(h <= t for h, t in zip(layer.hessian_tokens, layer.tokens, strict=True))
        for matrix in layer.matrices.values():
            assert len(matrix.error) == 8
            assert sum(matrix.level_counts) == matrix.weights == 8 * 64 * 128
    saved = json.loads((output / "report.json").read_text())
    assert saved["losses"] == report.losses
    assert saved["layers"][0]["tokens"] == report.layers[0].tokens


def stored_expert_bytes(folder):
    groups = (group for found in packed.open_checkpoint(folder).groups.values() for group in found)
    return sum(entry.nbytes for group in groups for entry in group.file.arrays.values())


def test_compressed_weights_are_ternary_and_bits_are_the_files(compressed):
    output, report = compressed
    opened = source.open_source(output)
    zeros, weights = 0, 0
    for stack in configs.STACKS:
        for layer in (1, 3):
            for group in opened.expert_groups(stack, layer, 8):
                for kernel in group.arrays.values():
                    zeros += kernel.size - np.count_nonzero(kernel)
                    weights += kernel.size
                    for row in kernel[0].T:
                        assert len(np.unique(row)) <= 3
    bits = 8 * stored_expert_bytes(output)
    assert report.totals["zero_fraction"] == zeros / weights
    assert report.totals["bits_per_expert_weight"] == bits / weights


def test_the_error_of_every_expert_is_reported(compressed):
    for layer in compressed[1].layers:
        for matrix in layer.matrices.values():
            assert all(0 < error < 1 for error in matrix.error if error is not None)


@pytest.mark.parametrize("model", ["tiny_switch_c", "tiny_switch_xxl"])
def test_untied_all_sparse_and_gated_models(model, data_dir, text, tmp_path):
    report = run(checkpoint(data_dir, model), tmp_path / "out", text)
    assert report.losses["compressed"] == loss_of(tmp_path / "out", text)
    matrices = {"tiny_switch_c": ["wi", "wo"], "tiny_switch_xxl": ["wi_0", "wi_1", "wo"]}
    assert all(list(layer.matrices) == matrices[model] for layer in report.layers)


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer(bits=2, group_size=32),
        Quantizer(bits=3, true_sequential=True),
        Quantizer(bits=4, activation_order=True),
        Quantizer(bits="ternary", method="rtn"),
        Quantizer(bits=4, method="rtn"),
    ],
    ids=lambda q: f"{q.method}-{q.bits}",
)
def test_other_quantizers_store_what_they_computed(quantizer, data_dir, text, tmp_path):
    path = checkpoint(data_dir, "tiny_switch_base")
    report = run(path, tmp_path / "out", text, quantizer=quantizer)
    assert report.losses["compressed"] == loss_of(tmp_path / "out", text)
    assert report.totals["expert_bytes"] == stored_expert_bytes(tmp_path / "out")


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_dense_codec_holds_what_cannot_be_packed(store_dtype, data_dir, text, tmp_path):
    path = checkpoint(data_dir, "tiny_switch_base")
    quantizer = Quantizer(group_size=16, activation_order=True)
    options = {"quantizer": quantizer, "codec": "dense", "store_dtype": store_dtype}
    report = run(path, tmp_path / "out", text, **options)
    assert report.losses["compressed"] == loss_of(tmp_path / "out", text)


def test_bfloat16_activations(data_dir, text, tmp_path):
    path = checkpoint(data_dir, "tiny_switch_base")
    report = run(path, tmp_path / "out", text, compute={"activation_dtype": "bfloat16"})
    quiet = rich.console.Console(file=io.StringIO())
    compute = compress.Compute(activation_dtype="bfloat16")
    options = {"num_validation_samples": 8, "compute": compute, "console": quiet}
    again = evaluate.evaluate(str(tmp_path / "out"), text, **options)
    assert report.losses["compressed"] == again["loss"]


def test_experts_without_tokens_are_rounded_and_named(data_dir, text, tmp_path):
    path = checkpoint(data_dir, "tiny_switch_base")
    report = run(path, tmp_path / "out", text, samples=1)
    starved = [layer for layer in report.layers if 0 in layer.hessian_tokens]
    assert starved
    for layer in report.layers:
        without = {str(e) for e, count in enumerate(layer.hessian_tokens) if not count}
        assert {e for e, why in layer.fallbacks.items() if "no calibration" in why} == without


def test_settings_are_what_the_store_and_the_report_say(compressed, data_dir, text):
    output, report = compressed
    header = packed.open_checkpoint(output).header
    assert header.settings == json.loads(json.dumps(report.settings))
    assert header.source["path"] == report.checkpoint["path"]
    assert header.source["step"] == 500100


def test_validation_text_does_not_reach_the_weights(compressed, data_dir, text, tmp_path):
    path = checkpoint(data_dir, "tiny_switch_base")
    other = tmp_path / "other.txt"
    other.write_text("quite another text, many times over, to be cut into samples\n" * 400)
    report = run(path, tmp_path / "out", dataclasses.replace(text, validation_files=str(other)))
    assert report.losses["compressed"] != compressed[1].losses["compressed"]
    assert files(tmp_path / "out") == files(compressed[0])


def test_a_packed_checkpoint_is_not_compressed_again(compressed, text, tmp_path):
    with pytest.raises(ValueError, match="is a packed checkpoint already"):
        run(compressed[0], tmp_path / "out", text)


def test_a_pack_is_evaluated_in_smaller_groups_than_it_was_made_in(compressed, text):
    quiet = rich.console.Console(file=io.StringIO())
    compute = compress.Compute(experts_per_group=3)
    options = {"num_validation_samples": 8, "compute": compute, "console": quiet}
    again = evaluate.evaluate(str(compressed[0]), text, **options)
    assert again["loss"] == compressed[1].losses["compressed"]


def test_dry_run_writes_nothing(data_dir, text, tmp_path):
    path = checkpoint(data_dir, "tiny_switch_base")
    report = run(path, tmp_path / "out", text, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert report.samples["calibration"]["samples"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": Quantizer(group_size=32)}, "one minimum and maximum a row"),
        ({"quantizer": Quantizer(bits=2), "codec": "qmoe"}, "CODEC 'qmoe' does not hold 2 bits"),
        (
            {"quantizer": Quantizer(bits=2, group_size=32, activation_order=True)},
            "GROUP_SIZE with ACTIVATION_ORDER",
        ),
        ({"store_dtype": "float16"}, "STORE_DTYPE is 'float16'"),
        ({"compute": {"activation_dtype": "int8"}}, "ACTIVATION_DTYPE is 'int8'"),
        ({"compute": {"experts_per_group": 0}}, "EXPERTS_PER_GROUP is 0"),
        ({"samples": 0}, "NUM_SAMPLES is 0"),
        ({"compute": {"batch_tokens": 0}}, "BATCH_TOKENS is 0"),
        ({"compute": {"read_budget": -1}}, "READ_BUDGET is -1"),
        ({"samples": 100_000}, "gave .* of the 100000 samples"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    options, message, data_dir, text, tmp_path
):
    path = checkpoint(data_dir, "tiny_switch_base")
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "out", text, **options)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused(compressed, data_dir, text):
    path = checkpoint(data_dir, "tiny_switch_base")
    with pytest.raises(CheckpointError, match="finished packed checkpoint"):
        run(path, compressed[0], text)


def test_a_missing_chunk_is_named_and_leaves_no_finished_store(data_dir, text, tmp_path):
    original = t5x.open_checkpoint(checkpoint(data_dir, "tiny_switch_base"))
    params = t5x.read_many(original, list(original.leaves))
    copy = t5x_writer.save(tmp_path / "copy", params, step=7)
    (copy / "target.decoder.layers_1.mlp.expert.wo.kernel" / "5.0.0").unlink()
    with pytest.raises(CheckpointError, match=r"decoder.layers_1.mlp.expert.wo"):
        run(copy, tmp_path / "out", text)
    with pytest.raises(CheckpointError, match="is not finished"):
        packed.open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder/layers_1/mlp/expert/wo/kernel", np.nan),
        ("encoder/layers_3/mlp/expert/wi/kernel", 3.4e38),
        ("encoder/layers_3/mlp/router/router_weights/w/kernel", np.nan),
        ("token_embedder/embedding", np.inf),
    ],
)
def test_weights_that_are_not_finite_are_named(name, value, data_dir, text, tmp_path):
    original = t5x.open_checkpoint(checkpoint(data_dir, "tiny_switch_base"))
    params = dict(t5x.read_many(original, list(original.leaves)))
    params[name] = params[name].copy()
    params[name].reshape(-1)[-1] = value
    copy = t5x_writer.save(tmp_path / "copy", params, step=7)
    where = f"expert 7 of `{name}` holds" if "/expert/" in name else f"{name}` of .* holds NaN"
    with pytest.raises(CheckpointError, match=where):
        run(copy, tmp_path / "out", text)


def test_round_to_nearest_asks_for_no_calibration_text(data_dir, text, tmp_path):
    path = checkpoint(data_dir, "tiny_switch_base")
    options = {"samples": None, "quantizer": Quantizer(method="rtn"), "dry_run": True}
    report = run(path, tmp_path / "out", dataclasses.replace(text, files=()), **options)
    assert set(report.samples) == {"validation"}
