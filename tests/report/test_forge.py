"""The report of forging, from a ledger that the loop wrote, opened in a browser."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from forgetrain.cli import report
from forgetrain.errors import UserError
from forgetrain.forge.profile import Profile
from forgetrain.forge.proposers.base import Proposal
from forgetrain.judge.by_hand import keeping
from forgetrain.judge.ledger import Ledger
from forgetrain.report.forge import write_forge_report
from tests.forge.test_optimise import Script, Verdicts, loop, prepared
from tests.report.browser import look, needs_a_browser

PROFILE = Profile(
    step_seconds=0.25,
    ops={"linear": 0.14, "attention": 0.06, "rmsnorm": 0.03, "other": 0.02},
    product_rate=1.5e11,
    bandwidth=2e10,
    rows=[("step/layer", "aten::mm", 0.5, 14.0), ("step/attention_blocked_forward", "aten::bmm", 0.2, 56.0)],
)


@pytest.fixture
def forged(tmp_path):
    """Runs: two elections, an attempt that lost the race, one that failed a gate, one without a candidate."""
    target = prepared(tmp_path, minutes=5)
    sources = ["speed = 1.2\n", "bad\n# <b>not bold</b>\n", "", "speed = 1.1\n", "speed = 1.5\n"]
    made = loop(target, tmp_path, Script(sources), profiler=lambda file: PROFILE)
    made.run()
    made.ledger.close()
    return target, tmp_path


def page(forged):
    target, runs = forged
    with Ledger(runs / "ledger") as ledger:
        return write_forge_report(target, ledger, runs / "forge.html")


def test_it_says_what_became_of_each_attempt(forged):
    text = page(forged).read_text()
    body = text[text.index("<body>") :]
    assert "<b>1.50×</b>" in body
    assert "<b>6</b> attempts, 2 elected" in body
    assert "rejected by G4" in body
    assert "# &lt;b&gt;not bold&lt;/b&gt;" in body
    assert "<b>not bold" not in body
    assert '<span class="added">+speed = 1.5</span>' in body
    assert re.search(r"<td>attempts</td><td class=\"number\">6</td><td class=\"number\">200</td>", body)
    assert "Most time is lost in linear" in body or "Most time is lost in attention" in body


def test_it_needs_no_network(forged):
    text = page(forged).read_text()
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "<script src" not in text
    assert "http" not in outside
    assert text.count("plotly.js v") == 1


def test_before_the_first_attempt_there_is_the_aligned_engine(tmp_path):
    target = prepared(tmp_path)
    made = loop(target, tmp_path, Script([]))
    with made.claimed():
        pass
    text = write_forge_report(target, made.ledger, tmp_path / "forge.html").read_text()
    assert "the aligned engine is champion" in text
    assert "Speed by attempt" not in text
    assert "Where the time goes" not in text


def test_a_ledger_without_this_target_is_one_line(tmp_path):
    target = prepared(tmp_path)
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(UserError, match="has no champion of tiny"):
        write_forge_report(target, ledger, tmp_path / "forge.html")


def test_the_command_writes_it_beside_the_run(forged, tmp_path, monkeypatch):
    target, runs = forged
    monkeypatch.setattr(report, "read_target", lambda path, overrides: target)
    app = report.typer.Typer()
    app.command()(report.command)
    result = CliRunner().invoke(app, ["x.toml", "--runs", str(runs), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert (runs / target.name / "forge.html").is_file()
    with pytest.raises(UserError, match="folder does not exist"):
        CliRunner().invoke(
            app, ["x.toml", "--runs", str(runs), "--out", str(runs / "no" / "x.html")], catch_exceptions=False
        )


def test_what_somebody_judged_by_hand_is_no_part_of_the_forging(tmp_path):
    target = prepared(tmp_path, attempts=1)
    made = loop(target, tmp_path, Script(["speed = 1.5\n"]))
    folder = made.run().folder

    def told():
        return re.sub(r"plot-\d+", "", write_forge_report(target, made.ledger, tmp_path / "forge.html").read_text())

    before = told()
    against_nobody = Verdicts().judge(folder / "engine.py", on_verdict=lambda verdict: None)
    with keeping(tmp_path, target, folder / "engine.py", {}, {}) as kept:
        kept.end(against_nobody)
    assert told() == before
    judge = Verdicts()
    assert loop(target, tmp_path, Script([]), judge).run().gain == pytest.approx(1.5)
    assert judge.seen == []  # nor does it make the loop verify anybody
    assert loop(target, tmp_path, Script([]), judge).submit(Proposal("speed = 1.5\n", "")).ended == "was judged before"


@needs_a_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_every_plot_without_an_error(forged, tmp_path, width):
    seen = look(page(forged), tmp_path, width)
    assert seen.errors == []
    assert seen.plots == 5
    assert seen.points > 10
    assert seen.overflow <= 0


@needs_a_browser
@pytest.mark.slow
def test_a_broken_page_is_noticed(forged, tmp_path):
    path = page(forged)
    path.write_text(path.read_text().replace("Plotly.react(", "Plotly.rect("))
    seen = look(path, tmp_path, 1280)
    assert seen.errors
    assert seen.plots == 0
