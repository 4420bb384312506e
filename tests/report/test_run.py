from __future__ import annotations

from forgetrain.report.run import write_report

OUTCOME = {
    "target": "tiny",
    "passed": False,
    "stopped": "align",
    "proofs": [{"what": "G1: a <claim>", "passed": False, "evidence": "first difference at x#fwd@0"}],
    "stages": {"collect": 1.0, "align": 2.5},
    "places": {"golden record": "runs/tiny/golden"},
    "reference": {"name": "megatron", "shims": {}},
    "environment": {"torch": "2.13.0", "threads": 2},
}


def test_a_run_that_stopped_has_a_page_of_what_there_is(tmp_path):
    page = write_report(OUTCOME, tmp_path).read_text()
    assert "Stopped after align." in page
    assert "G1: a &lt;claim&gt;" in page
    assert "torch 2.13.0, threads 2." in page
    assert "A reply" not in page
    assert "The engine</h2>" not in page


def test_a_page_needs_no_network(tmp_path):
    page = write_report({**OUTCOME, "passed": True, "stopped": None}, tmp_path).read_text()
    assert "Every gate passed." in page
    assert "<script src" not in page
    assert "<link" not in page
