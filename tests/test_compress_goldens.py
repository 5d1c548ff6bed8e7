# SPDX-License-Identifier: Apache-2.0
"""The published code's results on a small trained model: its weights, levels and losses.

`data/qmoe/trained` holds that model as Hugging Face transformers saved it, its token data, and for
each mode the dequantized weights and the validation loss that the published code gave in float32.
"""

import io

import numpy as np
import pytest
import rich.console

from qmoe_jax.calibration import data
from qmoe_jax.calibration.text import Samples
from qmoe_jax.checkpoints import source
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs import compress
from qmoe_jax.runs.groups import Formats

MODES = {
    "gptq1.5": Quantizer(),
    "gptq1.5_actorder": Quantizer(activation_order=True),
    "gptq2": Quantizer(bits=2),
    "rtn1.5": Quantizer(method="rtn"),
    "rtn2": Quantizer(method="rtn", bits=2),
}


@pytest.fixture(scope="module")
def trained(data_dir):
    return data_dir / "qmoe" / "trained"


@pytest.fixture(scope="module")
def samples(trained):
    """The published decoder sequence is fed whole; ours ends one token earlier, at its target."""
    tokens = np.load(trained / "tokens.npz")
    encoder = np.split(tokens["enc"], np.cumsum(tokens["enc_len"])[:-1])
    decoder = np.split(tokens["dec"], np.cumsum(tokens["dec_len"])[:-1])
    made = [data.Sample(x, y[:-1], y[1:]) for x, y in zip(encoder, decoder, strict=True)]
    split = int(tokens["trainsamples"])
    return Samples(
        int(tokens["mask_start"]),
        data.stack_samples(made[:split]),
        data.stack_samples(made[split:]),
    )


def run(trained, samples, folder, quantizer, **compute):
    return compress.compress_samples(
        source.open_source(trained),
        samples,
        str(folder),
        quantizer=quantizer,
        formats=Formats("dense", np.dtype(np.float32), np.dtype(np.float32)),
        compute=compress.Compute(**compute),
        compare_round_to_nearest=False,
        text_settings={},
        dry_run=False,
        console=rich.console.Console(file=io.StringIO()),
    )


@pytest.mark.parametrize("mode", MODES)
def test_weights_and_losses_of_the_published_code(mode, trained, samples, tmp_path):
    report = run(trained, samples, tmp_path / "out", MODES[mode])
    golden = np.load(trained / f"{mode}.npz")
    packed = source.open_source(tmp_path / "out")
    equal, total = 0, 0
    for stack in ("encoder", "decoder"):
        for layer in (1, 3):
            for group in packed.expert_groups(stack, layer, 8):
                for name, kernel in group.arrays.items():
                    expected = golden[f"{stack}/layers_{layer}/{name}"][group.start : group.stop]
                    scale = np.abs(expected).max()
                    close = np.abs(kernel.swapaxes(1, 2) - expected) < 1e-5 * scale
                    equal, total = equal + close.sum(), total + close.size
    assert total == 4 * 2 * 8 * 64 * 128
    assert equal / total >= 0.9999
    assert report.losses["compressed"] == pytest.approx(float(golden["loss"]), abs=1e-4)
    full = float(np.load(trained / "fp.npz")["loss"])
    assert report.losses["original"] == pytest.approx(full, abs=1e-4)
