# SPDX-License-Identifier: Apache-2.0
"""Compresses a tiny Switch checkpoint on a CPU, then evaluates the original and the pack.

    python examples/tiny_end_to_end.py

The checkpoint was written by T5X; its weights are random, so the losses only show that all parts
work together. It takes about a minute, most of it compilation.
"""

import pathlib
import shutil

import qmoe_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "tests/data/t5x/tiny_switch_base/legacy/checkpoint_500100"


def main(output: pathlib.Path = pathlib.Path("demo_output")) -> dict[str, float]:
    """Returns the losses: original, round-to-nearest, compressed, and the pack evaluated."""
    text = qmoe_jax.Text(
        sentencepiece_model_file=str(ROOT / "tests/data/text/sentencepiece.model"),
        files=str(ROOT / "tests/data/text/calibration.jsonl"),
        validation_files=str(ROOT / "tests/data/text/heldout.jsonl"),
        task_feature_lengths={"inputs": 256},
    )
    shutil.rmtree(output, ignore_errors=True)
    report = qmoe_jax.compress(
        str(CHECKPOINT),
        str(output),
        text,
        num_samples=256,
        num_validation_samples=32,
        compare_round_to_nearest=True,
    )
    again = qmoe_jax.evaluate(str(output), text, num_validation_samples=32)
    print(f"the pack in {output}: loss {again['loss']:.4f}, as its compression reported")
    return {**report.losses, "evaluated": again["loss"]}


if __name__ == "__main__":
    main()
