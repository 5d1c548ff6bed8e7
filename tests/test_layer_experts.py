# SPDX-License-Identifier: Apache-2.0
"""A group that the device has no room for is solved in parts, to the same bits."""

import io

import jax
import pytest
import rich.console

from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints import packed
from qmoe_jax.runs import compress, groups


def run(data_dir, output, **options):
    demo = data_dir / "text"
    text = Text(
        sentencepiece_model_file=str(demo / "sentencepiece.model"),
        files=str(demo / "calibration.jsonl"),
        validation_files=str(demo / "heldout.jsonl"),
        task_feature_lengths={"inputs": 64},
        document_mode="split",
    )
    return compress.compress(
        str(data_dir / "t5x/tiny_switch_base/legacy"),
        str(output),
        text,
        num_samples=16,
        num_validation_samples=4,
        **{"console": rich.console.Console(file=io.StringIO()), **options},
    )


def out_of_memory(beyond, patch):
    """Solves no group of more experts than that."""
    solve = groups.solve

    def limited(*arguments):
        group = arguments[5]
        if group.stop - group.start > beyond:
            group.arrays.clear()  # as `solve` does, before it gets so far
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return solve(*arguments)

    patch.setattr(groups, "solve", limited)


def test_groups_are_halved_until_they_fit(data_dir, tmp_path, monkeypatch):
    whole = run(data_dir, tmp_path / "whole")
    out = io.StringIO()
    with monkeypatch.context() as patch:
        out_of_memory(3, patch)
        compute = compress.Compute(experts_per_group=7)  # 7 -> 4 -> 2, and 1 expert is left
        console = rich.console.Console(file=out)
        report = run(data_dir, tmp_path / "halved", compute=compute, console=console)
    assert report.machine["halved_groups"] == [4, 2]
    assert "the device is out of memory: groups of 4 experts from here on" in out.getvalue()
    assert report.losses == whole.losses
    for folder in ("whole", "halved"):
        packed.open_checkpoint(tmp_path / folder)
    for one, other in zip(whole.layers, report.layers, strict=True):
        assert one.tokens == other.tokens
        for name, matrix in one.matrices.items():
            assert matrix.error == other.matrices[name].error
            assert matrix.level_counts == other.matrices[name].level_counts
    store = packed.open_checkpoint(tmp_path / "halved")
    sizes = [group.stop - group.start for group in store.groups["encoder", 1]]
    assert max(sizes) == 2
    assert sum(sizes) == 8


def test_groups_are_packed_in_parts_that_fit(data_dir, tmp_path, monkeypatch):
    whole, pack, out = run(data_dir, tmp_path / "whole"), groups.pack, io.StringIO()

    def limited(quantizer, formats, group, *rest):
        if group.stop - group.start > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return pack(quantizer, formats, group, *rest)

    monkeypatch.setattr(groups, "pack", limited)
    compute = compress.Compute(experts_per_group=7)  # 7 -> 4 + 3, 4 -> 2 + 2, and 1 is left
    console = rich.console.Console(file=out)
    report = run(data_dir, tmp_path / "parts", compute=compute, console=console)
    assert "expert 0: the device is out of memory: packed in two parts" in out.getvalue()
    assert report.machine["halved_groups"] == []
    assert report.losses == whole.losses
    for one, other in zip(whole.layers, report.layers, strict=True):
        assert one.matrices == other.matrices
        assert one.tokens == other.tokens
    store = packed.open_checkpoint(tmp_path / "parts")
    assert [group.start for group in store.groups["encoder", 1]] == [0, 2, 4, 7]


def test_one_expert_that_does_not_fit_is_an_error(data_dir, tmp_path, monkeypatch):
    out_of_memory(0, monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        run(data_dir, tmp_path / "out")
