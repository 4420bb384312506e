"""What makes a process repeatable."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from forgetrain.forge.search import pinned
from tests.tiny import tiny_target

CODE = """
import sys, torch
if {imported}:
    import torch._inductor.config
from forgetrain.numerics.determinism import make_deterministic
make_deterministic(1, "cpu")
assert torch.are_deterministic_algorithms_enabled()
assert torch.get_num_threads() == 1
assert ("torch._inductor.config" in sys.modules) is {imported}
import torch._inductor.config
assert torch._inductor.config.deterministic
"""


@pytest.mark.parametrize("imported", [False, True])
def test_the_compiler_is_told_whether_it_was_imported_or_will_be(imported):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(imported=imported)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_block_leaves_the_environment_as_it_was():
    """Else a server of forked processes, which serves one environment, would not be found again after it."""
    before = dict(os.environ)
    with pinned(tiny_target().hardware):
        assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
    assert dict(os.environ) == before
