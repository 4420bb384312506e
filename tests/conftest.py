"""Every test runs with the thread count on which bits depend, and Triton's kernels under its interpreter on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be chosen before Triton is first imported


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
