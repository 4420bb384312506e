"""Kernels of fp8 engines compiled for a Hopper GPU, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")


def test_kernels_compile_for_sm_90(tmp_path):
    """And numbers are rounded by the hardware, to nearest, and written sixteen bytes at a time both ways."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("sm90.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(facts["cubin"] > 0 and facts["mixed_up"] == 0 for facts in found)
    rounding = [f for f in found if f["kernel"].startswith("quantise")]
    for facts, kind in zip(rounding, ("e4m3", "e5m2", "e4m3", "e4m3"), strict=True):
        assert f"cvt.rn.satfinite.{kind}x2.f32" in facts["instructions"]
        assert {i for i in facts["instructions"] if i.startswith("st.")} == {"st.global.b32", "st.global.v4.b32"}
    noting = [f["kernel"] for f in found if any(i.startswith("atom.global") for i in f["instructions"])]
    assert len(noting) == len(found) - len(rounding)
