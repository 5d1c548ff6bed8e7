# SPDX-License-Identifier: Apache-2.0
import dataclasses
import os
import pathlib
import platform
import subprocess
import sys

import numpy as np
import pytest
import tiny_switch

from qmoe_jax.runs import devices


def test_groups_are_equal_and_fit_the_budget(monkeypatch):
    config = dataclasses.replace(tiny_switch.config("tiny_switch_base"), num_experts=100)
    one = devices.group_bytes(config)
    monkeypatch.setattr(devices, "CPU_GROUP_BYTES", 30 * one)
    assert devices.experts_per_group(config, None) == 25
    monkeypatch.setattr(devices, "CPU_GROUP_BYTES", one // 2)
    assert devices.experts_per_group(config, None) == 1
    assert devices.experts_per_group(config, 1000) == 100
    with pytest.raises(ValueError, match="EXPERTS_PER_GROUP is 0"):
        devices.experts_per_group(config, 0)


def test_a_share_of_the_experts_is_a_group_at_most(monkeypatch):
    config = dataclasses.replace(tiny_switch.config("tiny_switch_base"), num_experts=100)
    monkeypatch.setattr(devices, "CPU_GROUP_BYTES", 1000 * devices.group_bytes(config))
    assert devices.experts_per_group(config, None, num_devices=8) == 10
    assert devices.experts_per_group(config, None, num_devices=200) == 1


def test_what_is_on_the_device_does_not_follow_the_host():
    host = np.ones((4, 16), np.float32)
    device = devices.to_device(host)
    host[:] = 7
    assert (np.asarray(device) == 1).all()


FAULTS = """
import resource
from qmoe_jax.runs import devices
devices.keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_memory_is_kept_for_the_next_user_unless_the_environment_says_how(chosen):
    """What was kept has its pages already: taking it again faults in none of 16,384."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=given | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) < 1000) == (not chosen)


def test_the_peak_is_this_process_own():
    """A small process started by one that is made large first."""
    script = "from qmoe_jax.runs import devices; print(devices.peak_host_bytes())"
    held = np.ones(1 << 28)  # 2 GiB
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 1 << 24 < int(done.stdout) < held.nbytes // 2
    assert devices.peak_host_bytes() > held.nbytes


COMPILED = """
import jax
from qmoe_jax.runs import devices
devices.keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
"""


def _compiled_programs_folder(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_compiled_programs_are_kept_unless_jax_is_told_where(tmp_path):
    chosen = _compiled_programs_folder(XDG_CACHE_HOME=str(tmp_path))
    assert pathlib.Path(chosen).parent == tmp_path / "qmoe_jax" / "xla"
    assert _compiled_programs_folder(XDG_CACHE_HOME=str(tmp_path)) == chosen
    told = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    assert _compiled_programs_folder(**told) == str(tmp_path / "mine")
