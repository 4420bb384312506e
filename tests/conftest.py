"""Every test runs with the thread count on which bits depend, Triton's kernels under its interpreter on a CPU, and a
terminal of one width and no colours: what a table shows must not depend on where the tests are started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be chosen before Triton is first imported

for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)
os.environ["COLUMNS"] = "160"  # read by the product's console when it is first imported


@contextmanager
def _unnamed() -> Iterator[None]:
    """Takes the running test's name out of the environment: a server of forked processes, which takes seconds to start,
    goes on serving while the environment stays the same."""
    name = os.environ.pop("PYTEST_CURRENT_TEST", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["PYTEST_CURRENT_TEST"] = name


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup():
    with _unnamed():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    with _unnamed():
        return (yield)


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
