# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and this project's improvements on a small trained model, in one run.

    python benchmarks/paper_tables.py --seeds 4 --output tables.md

The model is the demo checkpoint, or --checkpoint with its --vocabulary, --calibration and
--heldout. Every row compresses it anew with each seed, which draws other masked spans of the same
text, and is measured on that seed's held-out samples, the same for all rows. A minute or two for
each ten rows on two cores.
"""

import argparse
import dataclasses
import datetime
import io
import math
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import rich.console

from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints import source
from qmoe_jax.codec import rates
from qmoe_jax.models import config as configs
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import Report
from qmoe_jax.runs import compress, devices

DEMO = pathlib.Path(__file__).parents[1] / "examples" / "demo"
BEST = {"mask_special_tokens": False, "grid": "least_squares"}
HEAD = (
    "| | gap, nats | zeros | entropy | stored | rate |",
    "|---|---|---|---|---|---|",
)
LAMBDAS = (0.0, 0.02, 0.05, 0.08, 0.12, 0.2, 0.3)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of compressing."""

    name: str
    quantizer: Quantizer
    num_samples: int | None = None  # None: the run's
    codec: Any = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came out, over all seeds."""

    full: float  # loss of the uncompressed model, nats a target
    gap: float  # above it
    gap_error: float  # standard error
    zeros: float
    entropy: float  # bits a weight
    bits: float  # bits a weight, as stored
    rate: float  # of the whole model, against bfloat16


@dataclasses.dataclass(frozen=True)
class Given:
    """The model and its text."""

    checkpoint: str
    text: Text
    num_samples: int
    num_validation_samples: int
    seeds: tuple[int, ...]


def tables() -> dict[str, list[Row]]:
    """By title; a row of the same settings is measured once."""

    def row(name: str, codec: Any = None, num_samples: int | None = None, **settings: Any) -> Row:
        return Row(name, Quantizer(**settings), num_samples, codec)

    paper = row("GPTQ, ternary: the paper")
    return {
        "Bits and methods (the paper's table 4)": [
            row("RTN, ternary", method="rtn"),
            *(row(f"RTN, {bits} bits", method="rtn", bits=bits) for bits in (2, 3, 4)),
            paper,
            *(row(f"GPTQ, {bits} bits", bits=bits) for bits in (2, 3, 4)),
        ],
        "Each improvement alone, and together": [
            paper,
            row("near-entropy codec", "tunstall"),
            row("sentinels in the Hessians", mask_special_tokens=False),
            row("least squares, values alone", grid="least_squares", sweeps=0),
            row("least squares, 3 sweeps", grid="least_squares"),
            row("least squares, LAMBDA 0.05", grid="least_squares", penalty=0.05),
            row("all, values alone", "tunstall", **BEST, sweeps=0),
            *(
                row(f"all, LAMBDA {penalty}", "tunstall", **BEST, penalty=penalty)
                for penalty in LAMBDAS
            ),
        ],
        "Ablations of the paper's settings": [
            paper,
            *(row(f"{part} samples", num_samples=part) for part in (40, 160, 320)),
            *(row(f"damping {damping}", damping=damping) for damping in (0.01, 0.03, 0.3, 1.0)),
            row("activation order", activation_order=True),
            row("true sequential", true_sequential=True),
            row("tokens capped at the mean", token_cap=1.0),
            row("2 bits, groups of 64 columns", bits=2, group_size=64),
            row("2 bits", bits=2),
        ],
        "Ablations of least squares": [
            *(
                row(f"SWEEPS {sweeps}", **BEST, penalty=0.08, sweeps=sweeps)
                for sweeps in (1, 2, 3, 5, 8)
            ),
            *(
                row(f"damping {damping}", **BEST, penalty=0.08, damping=damping)
                for damping in (0.01, 0.3)
            ),
            row("activation order", **BEST, penalty=0.08, activation_order=True),
            row("true sequential", **BEST, penalty=0.08, true_sequential=True),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables on a small model")
    parser.add_argument("--checkpoint", default=str(DEMO / "checkpoint_9000"))
    parser.add_argument("--vocabulary", default=str(DEMO / "sentencepiece.model"))
    parser.add_argument("--calibration", default=str(DEMO / "calibration.jsonl"))
    parser.add_argument("--heldout", default=str(DEMO / "heldout.jsonl"))
    parser.add_argument("--inputs", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--validation-samples", type=int, default=224)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", help="markdown; else it is printed")
    parser.add_argument("--smoke", action="store_true", help="little of everything, for the tests")
    arguments = parser.parse_args()
    given = Given(
        checkpoint=arguments.checkpoint,
        text=Text(
            sentencepiece_model_file=arguments.vocabulary,
            files=arguments.calibration,
            validation_files=arguments.heldout,
            task_feature_lengths={"inputs": arguments.inputs},
            document_mode="split",
        ),
        num_samples=16 if arguments.smoke else arguments.samples,
        num_validation_samples=8 if arguments.smoke else arguments.validation_samples,
        seeds=tuple(range(1 if arguments.smoke else arguments.seeds)),
    )
    wanted = tables()
    if arguments.smoke:
        wanted = {title: rows[:2] for title, rows in wanted.items()}
    page = markdown(given, wanted)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(page)
    else:
        print(page)


def markdown(given: Given, wanted: dict[str, list[Row]]) -> str:
    """All tables, measured."""
    done: dict[Row, Measured] = {}
    for row in (row for rows in wanted.values() for row in rows):
        key = dataclasses.replace(row, name="")
        if key not in done:
            done[key] = measured([compressed(given, row, seed) for seed in given.seeds])
            print(f"{row.name}: {done[key]}", file=sys.stderr, flush=True)
    parts = [introduction(given, next(iter(done.values())).full)]
    for title, rows in wanted.items():
        lines = [line(row.name, done[dataclasses.replace(row, name="")]) for row in rows]
        parts.append("\n".join([f"## {title}\n", *HEAD, *lines]))
    return "\n\n".join(parts) + "\n"


def compressed(given: Given, row: Row, seed: int) -> Report:
    """The report of one run."""
    with tempfile.TemporaryDirectory() as folder:
        return compress.compress(
            given.checkpoint,
            str(pathlib.Path(folder, "packed")),
            dataclasses.replace(given.text, seed=seed),
            quantizer=row.quantizer,
            num_samples=row.num_samples or given.num_samples,
            num_validation_samples=given.num_validation_samples,
            codec=row.codec,
            console=rich.console.Console(file=io.StringIO()),
        )


def measured(reports: list[Report]) -> Measured:
    """Means over the seeds; their samples are taken to be independent."""
    gaps = [report.losses["compressed"] - report.losses["original"] for report in reports]
    errors = np.array([report.standard_errors["compressed"] for report in reports])
    matrices = [m for report in reports for layer in report.layers for m in layer.matrices.values()]
    weights = sum(matrix.weights for matrix in matrices)
    return Measured(
        full=float(np.mean([report.losses["original"] for report in reports])),
        gap=float(np.mean(gaps)),
        gap_error=float(np.sqrt(np.sum(errors**2)) / len(errors)),
        zeros=sum(matrix.zeros for matrix in matrices) / weights,
        entropy=sum(rates.entropy(m.level_counts) * m.weights for m in matrices) / weights,
        bits=float(np.mean([report.totals["bits_per_expert_weight"] for report in reports])),
        rate=float(np.mean([report.totals["compression"] for report in reports])),
    )


def line(name: str, found: Measured) -> str:
    """A row of a markdown table."""
    return (
        f"| {name} | {found.gap:+.4f} ± {found.gap_error:.4f} | {found.zeros:.1%} "
        f"| {found.entropy:.3f} | {found.bits:.3f} | {found.rate:.2f} |"
    )


def introduction(given: Given, full: float) -> str:
    """What was measured, and how."""
    config = source.open_source(given.checkpoint).config
    parameters = sum(math.prod(shape) for shape in configs.param_shapes(config).values())
    sentences = [
        f"`{pathlib.Path(given.checkpoint).name}`: {parameters / 1e6:.1f} M parameters, width "
        f"{config.emb_dim}, {config.num_experts} experts of width {config.expert_mlp_dim}.",
        f"{given.num_samples} calibration samples, {given.num_validation_samples} held out, of at "
        f"most {given.text.task_feature_lengths['inputs']} tokens; seeds {list(given.seeds)}, each "
        "with masked spans of its own.",
        f"The uncompressed model's loss is {full:.4f} nats a masked token; a gap is what a "
        "compressed one has above that on the same samples, ± one standard error.",
        "Bits are of an expert's weight: of the entropy of its levels, and as stored, with the "
        "values of rows. Rate: of the whole model, against bfloat16.",
    ]
    command = f"`python benchmarks/paper_tables.py --seeds {len(given.seeds)}`"
    return f"{command}, {datetime.date.today()}, {devices.description()}.\n\n{' '.join(sentences)}"


if __name__ == "__main__":
    main()
