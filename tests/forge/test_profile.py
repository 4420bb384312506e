"""A profile by op: what belongs to which op, and a real engine's in its process."""

from __future__ import annotations

import pytest

from forgetrain.engine import admit
from forgetrain.engine.plan import Plan
from forgetrain.engine.protocol import ProtocolError
from forgetrain.engine.serve import host_times, kernel_times
from forgetrain.engine.write import write_engine
from forgetrain.forge.profile import OTHER, Profile, op_of, profile_engine, read_profile, summarise
from forgetrain.judge.runner import Judge
from forgetrain.spec.op_costs import OPS, op_costs
from tests.tiny import tiny_target


@pytest.mark.parametrize(
    ("functions", "operator", "op"),
    [
        ("step/micro_step/layer", "aten::mm", "linear"),
        ("step/micro_step/head/add_product", "aten::addmm_", "linear"),
        ("step/layer/attention_blocked_forward", "aten::mm", "attention"),
        ("step/layer/residual_norm_region", "", "rmsnorm"),
        ("step/norm_blocked", "aten::linalg_vector_norm", "clip"),
        ("step/update/adamw_region", "", "adamw"),
        ("step/head/entropy_region", "", "cross_entropy"),
        ("step/micro_step", "aten::index_add_", "embedding"),
        ("step/layer/rope_megatron_forward/rotate_half", "aten::cat", "rope"),
        ("step/micro_batches", "aten::arange", OTHER),
        ("", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "linear"),
        ("", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("", "rmsnorm_backward_kernel", "rmsnorm"),
        ("", "vectorized_elementwise_kernel", OTHER),
    ],
)
def test_a_place_belongs_to_an_op(functions, operator, op):
    assert op_of(functions, operator) == op


def span(name, ts, dur, cat="python_function", tid=1):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_time_that_nothing_nested_took_counts():
    events = [
        span("serve.py(3): on_step", 0, 100),
        span("/forge/engine.py(9): step", 10, 80),
        span("/forge/engine.py(5): layer", 20, 50),
        span("torch/functional.py(1): helper", 22, 20),
        span("aten::matmul", 25, 15, "cpu_op"),
        span("aten::mm", 26, 10, "cpu_op"),
        span("aten::mul", 50, 5, "cpu_op"),
        span("aten::add", 0, 1000, "cpu_op", tid=2),  # a thread without the engine
        {"ph": "i", "name": "mark", "ts": 0},
    ]
    rows = {tuple(row[:2]): (round(row[2] * 1e6), row[3]) for row in host_times(events, "engine.py")}
    assert rows == {
        ("step", ""): (30, 1),
        ("step/layer", ""): (30, 1),
        ("step/layer", "aten::matmul"): (15, 1),
        ("step/layer", "aten::mul"): (5, 1),
    }
    assert host_times([span("aten::mm", 0, 1, "cpu_op")], "engine.py") == []


def test_kernels_count_by_their_names():
    events = [span("gemm", 0, 5, "kernel"), span("gemm", 9, 5, "kernel"), span("aten::mm", 0, 50, "cpu_op")]
    assert kernel_times(events) == [["", "gemm", 1e-5, 2]]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [["a", "b", 1.0]],
        [["a", "b", "1", 1]],
        [["a", "b", -1.0, 1]],
        [["a", "b", float("nan"), 1]],
        [[]] * 10_001,
    ],
)
def test_what_an_engine_says_of_itself_is_bounded(rows):
    with pytest.raises(ProtocolError):
        admit.profile("profile", {"rows": rows}, [])
    admit.profile("profile", {"rows": [["step", "aten::mm", 0.5, 3]]}, [])


def test_seconds_are_those_of_the_clock_and_gaps_are_ordered():
    target = tiny_target()
    found = {("step/layer", "aten::mm"): (6.0, 4), ("step/swiglu_region", ""): (3.0, 2), ("step", ""): (1.0, 2)}
    profile = summarise(found, 0.1, (1e12, 1e12))
    assert profile.ops == pytest.approx({"linear": 0.06, "swiglu": 0.03, OTHER: 0.01})
    assert profile.top(2) == (("linear", pytest.approx(0.6)), ("swiglu", pytest.approx(0.3)))
    gaps = profile.gaps(target)
    assert [gap.op for gap in gaps] == ["linear", "swiglu"]
    assert gaps[0].roofline == op_costs(target)["linear"].seconds(1e12, 1e12)
    slow_products = Profile(0.1, profile.ops, 1e6, 1e12, profile.rows)  # the linear op is at its roofline there
    assert slow_products.gaps(target)[0].op == "swiglu"
    assert read_profile(profile.as_dict()) == profile


def test_a_real_engine_is_profiled_by_op(tmp_path):
    target = tiny_target()
    file = tmp_path / "engine.py"
    file.write_text(write_engine(target, Plan.textbook()))
    with Judge(target) as judge:
        profile = profile_engine(judge, file)
    assert set(OPS) <= set(profile.ops)
    assert sum(profile.ops.values()) == pytest.approx(profile.step_seconds)
    assert profile.ops[OTHER] < 0.5 * profile.step_seconds
    assert profile.product_rate > 1e9
    assert profile.bandwidth > 1e8
