# SPDX-License-Identifier: Apache-2.0
"""The comparison with the released switch-base-8, as far as it goes without that checkpoint."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
from flax.traverse_util import unflatten_dict

from qmoe_jax.checkpoints import source
from qmoe_jax.models import switch


@pytest.fixture(scope="module")
def check_real(request):
    path = request.config.rootpath / "examples" / "check_real.py"
    spec = importlib.util.spec_from_file_location("check_real", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_other_models_are_refused(check_real, capsys):
    folder = tiny_switch.DATA / "tiny_switch_base" / "legacy"
    assert check_real.main([str(folder)]) == 1
    assert "is no switch-base-8" in capsys.readouterr().err


def test_outputs_are_those_behind_the_logits(check_real):
    opened = source.open_source(tiny_switch.DATA / "tiny_switch_base" / "legacy")
    flat = {k: jnp.asarray(v, jnp.float32) for k, v in source.all_params(opened).items()}
    params = unflatten_dict(flat, sep="/")
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    found = check_real.decoder_output(opened.config, params, tokens, tokens)
    ids = jnp.asarray(tokens)
    logits = switch.Switch(opened.config).apply({"params": params}, ids, ids, ids)
    again = switch.logits(opened.config, params, found)
    np.testing.assert_allclose(again, np.asarray(logits), atol=1e-5)


def test_gaps_are_filled(check_real):
    folder = tiny_switch.DATA.parents[2] / "examples" / "demo"
    vocabulary = check_real.load_vocabulary(str(folder / "sentencepiece.model"))
    opened = source.open_source(folder / "checkpoint_9000")
    flat = {k: jnp.asarray(v, jnp.float32) for k, v in source.all_params(opened).items()}
    sentence = "Return a list <extra_id_0> names <extra_id_1>."
    filled = check_real.fill(opened.config, unflatten_dict(flat, sep="/"), vocabulary, sentence)
    assert filled.startswith("Return a list [")
    assert "names [" in filled


def test_a_missing_vocabulary_is_named(check_real, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*x\.model; give --sentencepiece"):
        check_real.load_vocabulary(str(tmp_path / "x.model"))
