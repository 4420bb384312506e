"""Judging on a Ray cluster of this machine's two cores."""

from __future__ import annotations

import importlib.util
import os

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.judge.cluster import PHASES, Cluster, Place
from forgetrain.judge.runner import KNOWN_GOOD, NUMERIC, Effort
from tests.tiny import tiny_target

ray_needed = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
EFFORT = Effort(pairs=5, steps=1, warm_up=1)


def test_a_cluster_asks_every_gate_in_the_judges_order():
    assert tuple(gate for gates, _ in PHASES for gate in gates) == NUMERIC


def test_races_of_a_node_take_turns():
    cluster = Cluster.__new__(Cluster)
    cluster._places = [Place(None, node) for node in ("a", "a", "b", "b")]
    assert list(cluster._groups([0, 1, 2, 3], together=True)) == [[0, 1, 2, 3]]
    assert list(cluster._groups([0, 1, 2, 3], together=False)) == [[0, 2], [1, 3]]
    assert list(cluster._groups([1, 3], together=False)) == [[1, 3]]
    assert list(cluster._groups([], together=False)) == []


@ray_needed
@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_candidates_are_judged_at_once_on_a_local_cluster():
    target = tiny_target(hardware={"threads": 1}, gates={"g5_steps": 4}, reference={"name": "transformers"})
    good = write_engine(target, Plan(KNOWN_GOOD))
    bad = good.replace("1e-06", "1e-03")
    assert bad != good
    lines = []
    with Cluster(target, data=None, roofline_seconds=0.0, effort=EFFORT, say=lines.append) as cluster:
        assert cluster.slots >= 2
        judgements = cluster.judge_all([good.encode(), bad.encode()], good.encode())
        assert lines == [f"{cluster.slots} candidates at once on one node"]
    said = [verdict.explanation for verdict in judgements[0].verdicts]
    first, second = ([verdict.gate for verdict in judgement.verdicts] for judgement in judgements)
    assert first[:3] == ["contract", "G4.update", "G4.fp32"]
    assert "G7" in first, said  # no faster than itself, but it was raced
    assert judgements[0].samples
    failed = judgements[1].first_failure()
    assert failed is not None
    assert failed.gate in ("contract", "G4.fp32")
    assert "G7" not in second


@ray_needed
@pytest.mark.slow
def test_a_cluster_without_room_is_one_line():
    target = tiny_target(hardware={"threads": 4096})
    with pytest.raises(UserError, match="no node of the Ray cluster can judge this target"):
        Cluster(target, data=None, roofline_seconds=0.0, effort=EFFORT)
