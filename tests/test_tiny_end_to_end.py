# SPDX-License-Identifier: Apache-2.0
"""The example that `make demo` runs."""

import importlib.util


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
    printed = capsys.readouterr().out
    assert "as written" in printed and "round to nearest" in printed
