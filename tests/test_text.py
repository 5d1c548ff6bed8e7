# SPDX-License-Identifier: Apache-2.0

import dataclasses

import numpy as np
import pytest

from qmoe_jax.calibration import text
from qmoe_jax.calibration.text import Text


@pytest.fixture(scope="module")
def demo(request):
    return request.config.rootpath / "tests" / "data" / "text"


def options(demo, **changes):
    defaults = {
        "sentencepiece_model_file": str(demo / "sentencepiece.model"),
        "files": str(demo / "calibration.jsonl"),
        "task_feature_lengths": {"inputs": 128},
    }
    return Text(**(defaults | changes))


def sentences(samples):
    return {sample.decoder_target_tokens.tobytes() for sample in samples}


def test_samples_held_back_are_disjoint_and_of_the_number_asked_for(demo):
    samples = text.load(options(demo), 512, 40, 10)
    assert samples.calibration is not None and samples.validation is not None
    assert (len(samples.calibration), len(samples.validation)) == (40, 10)
    assert not sentences(samples.calibration) & sentences(samples.validation)
    assert samples.lowest_sentinel_id == 480


def test_validation_files_do_not_depend_on_the_calibration(demo):
    heldout = options(demo, validation_files=str(demo / "heldout.jsonl"))
    few, many = (text.load(heldout, 512, number, 10) for number in (5, 40))
    assert few.validation is not None and many.validation is not None
    np.testing.assert_array_equal(
        few.validation.encoder_input_tokens, many.validation.encoder_input_tokens
    )
    none = text.load(heldout, 512, 0, 10)
    assert none.calibration is None
    assert sentences(none.validation) == sentences(few.validation)


def test_another_seed_gives_other_samples(demo):
    one, other = (text.load(options(demo, seed=seed), 512, 20, 0) for seed in (0, 1))
    assert one.validation is None
    assert sentences(one.calibration) != sentences(other.calibration)


def test_a_tokenizer_larger_than_the_embedding_is_refused(demo):
    with pytest.raises(ValueError, match=r"512.*500"):
        text.load(options(demo), 500, 1, 0)


def test_numbers_that_cannot_be(demo):
    with pytest.raises(ValueError, match="NUM_VALIDATION_SAMPLES is -1"):
        text.load(options(demo), 512, 1, -1)
    with pytest.raises(ValueError, match="SEED is -1"):
        text.load(options(demo, seed=-1), 512, 1, 0)
    with pytest.raises(ValueError, match="CALIBRATION_FILES is not set"):
        text.load(options(demo, files=()), 512, 1, 0)
    same = options(demo)
    same = dataclasses.replace(same, validation_files=same.files)
    with pytest.raises(ValueError, match="the same text"):
        text.load(same, 512, 1, 1)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"targets": 114}, "expected a dict with `inputs`"),
        ({"inputs": 128, "outputs": 1}, "expected a dict with `inputs`"),
        ({"inputs": 512, "targets": 100}, "make up to 114"),
    ],
)
def test_lengths_that_cannot_be(demo, lengths, message):
    with pytest.raises(ValueError, match=message):
        text.load(options(demo, task_feature_lengths=lengths), 512, 1, 0)
