# SPDX-License-Identifier: Apache-2.0
import pytest
from etils import epath

from qmoe_jax.calibration import addresses, corpora, tokenizer


def test_local_paths_are_taken_as_they_are(tmp_path):
    assert addresses.path(tmp_path) == epath.Path(tmp_path)
    assert not addresses.path(str(tmp_path / "none")).exists()


@pytest.mark.parametrize(
    "read", [addresses.path, tokenizer.load_tokenizer, lambda name: list(corpora.documents(name))]
)
def test_addresses_that_nothing_reads_are_named(read):
    with pytest.raises(
        ValueError, match=r"http://host/a\.txt cannot be read .*: copy it to a local"
    ):
        read("http://host/a.txt")
