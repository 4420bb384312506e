"""Every test runs with the thread count on which bits depend, Triton's kernels under its interpreter on a CPU, and a
terminal of one width and no colours: what a table shows must not depend on where the tests are started."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be chosen before Triton is first imported

for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)
os.environ["COLUMNS"] = "160"  # read by the product's console when it is first imported


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
