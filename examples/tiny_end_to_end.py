# SPDX-License-Identifier: Apache-2.0
"""Compresses a small trained Switch Transformer, and lets both models fill gaps in text.

    python examples/tiny_end_to_end.py

The checkpoint is in T5X's layout; `examples/demo/train.gin` trained it. On two CPU cores this takes
about a minute.
"""

import pathlib
import shutil

import rich.console
import rich.table
import rich.text

import qmoe_jax
from qmoe_jax.calibration import data, tokenizer
from qmoe_jax.calibration import text as texts
from qmoe_jax.checkpoints import source
from qmoe_jax.inference import decoding, load, spans

DEMO = pathlib.Path(__file__).resolve().parent / "demo"
CHECKPOINT = DEMO / "checkpoint_9000"
TEXT = qmoe_jax.Text(
    sentencepiece_model_file=str(DEMO / "sentencepiece.model"),
    files=str(DEMO / "calibration.jsonl"),
    validation_files=str(DEMO / "heldout.jsonl"),
    task_feature_lengths={"inputs": 64},  # as it was trained
    document_mode="split",
)
SAMPLES, HELD_OUT_SAMPLES = 640, 224


def main(
    output: pathlib.Path = pathlib.Path("demo_output"),
    samples: int = SAMPLES,
    heldout_samples: int = HELD_OUT_SAMPLES,
) -> dict[str, float]:
    """Returns the losses: original, round-to-nearest, compressed, and the pack evaluated."""
    shutil.rmtree(output, ignore_errors=True)
    report = qmoe_jax.compress(
        str(CHECKPOINT),
        str(output),
        TEXT,
        num_samples=samples,
        num_validation_samples=heldout_samples,
        compare_round_to_nearest=True,
    )
    again = qmoe_jax.evaluate(str(output), TEXT, num_validation_samples=heldout_samples)
    print(f"the pack in {output}: loss {again['loss']:.4f}, as its compression reported")
    show_spans(output, heldout_samples, number=3)
    return {**report.losses, "evaluated": again["loss"]}


def show_spans(packed: pathlib.Path, heldout_samples: int, number: int) -> None:
    """Prints some held-out text with its gaps as they were, and as both models fill them."""
    vocabulary = tokenizer.load_tokenizer(TEXT.sentencepiece_model_file)
    config = source.open_source(CHECKPOINT).config
    heldout = texts.load(TEXT, config.vocab_size, 0, heldout_samples).validation
    assert heldout is not None
    chosen = list(heldout)[:: heldout_samples // number][:number]
    rows = [sample.encoder_input_tokens for sample in chosen]
    inputs = data.padded(rows, number, max(map(len, rows)))
    length = max(len(sample.decoder_target_tokens) for sample in chosen)
    filled = {"as written": [sample.decoder_target_tokens for sample in chosen]}
    for name, path in (("original", CHECKPOINT), ("compressed", packed)):
        tokens, _ = decoding.generate(load.load(path), inputs, length)
        filled[name] = list(tokens)
    table = rich.table.Table("", "gaps in held-out text", title="Gaps filled", show_lines=True)
    for i, sample in enumerate(chosen):
        for name, targets in filled.items():
            text = spans.filled(sample.encoder_input_tokens, targets[i], vocabulary)
            table.add_row(name, rich.text.Text(text))
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
