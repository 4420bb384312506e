"""The API is a real HTTP server on the loopback interface that speaks the protocol, and breaks it."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from forgetrain.errors import UserError
from forgetrain.forge.proposers import api as proposer
from forgetrain.forge.proposers.api import Api
from forgetrain.forge.proposers.base import Cost, NoProposal, Proposal
from tests.forge.proposers.briefs import brief

USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}


def completion(content, *, finish_reason="stop", **changes):
    message = {"role": "assistant", "content": content}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        "usage": USAGE,
        **changes,
    }


GOOD = completion("Fused two loops.\n\n```python\nx = 2\n```\n")


@pytest.fixture
def server(monkeypatch):
    """A server whose ``answers`` are (status, body) in turn, the last one for ever; it keeps the requests, and
    asks for a ``wait`` of milliseconds. A body is
    JSON, bytes, or an iterator of bytes: those are sent as they come, as a part of a long body."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answers, requests = self.server.answers, self.server.requests
            requests.append(json.loads(body))
            status, answer = answers[0] if len(answers) == 1 else answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", self.server.wait)
            parts = [answer] if isinstance(answer, bytes) else answer
            if isinstance(answer, dict | list | str | None):
                parts = [json.dumps(answer).encode()]
            elif not isinstance(answer, bytes):
                self.send_header("Content-Length", "1000000")
            self.end_headers()
            try:
                for part in parts:
                    self.wfile.write(part)
            except OSError:  # the client has gone
                return

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.answers, server.wait = [], [], "10"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def api(server, **options):
    return Api("m", base_url=f"http://127.0.0.1:{server.server_port}/v1", **options)


def blanks():
    """What keeps a connection alive and says nothing."""
    for _ in range(200):
        yield b" "
        time.sleep(0.05)


def test_the_block_in_the_answer_is_the_candidate(server):
    server.answers = [(200, GOOD)]
    proposal = api(server, prices=(1.0, 2.0)).propose(brief(dollars=5.0))
    assert isinstance(proposal, Proposal)
    assert (proposal.source, proposal.message) == ("x = 2\n", "Fused two loops.")
    assert (proposal.cost.tokens, proposal.cost.dollars) == (1500, 0.002)
    assert "x = 1" in server.requests[0]["messages"][1]["content"]
    assert "sk-secret" not in json.dumps(server.requests)


def test_lines_may_end_as_on_windows(server):
    server.answers = [(200, completion("Fused two loops.\r\n\r\n```python\r\nx = 2\r\ny = 3\r\n```\r\n"))]
    proposal = api(server).propose(brief())
    assert proposal == Proposal("x = 2\ny = 3\n", "Fused two loops.", cost=Cost(1500))


def test_rate_limits_and_overload_are_tried_again_and_cost_nothing(server):
    server.answers = [(429, {}), (503, {}), (200, GOOD)]
    proposal = api(server).propose(brief())
    assert isinstance(proposal, Proposal)
    assert proposal.cost.tokens == 1500
    assert len(server.requests) == 3


def test_rate_limits_without_end_are_a_failed_attempt(server):
    server.answers = [(429, {})]
    assert api(server).propose(brief()) == NoProposal("the API refused the request with status 429")
    assert len(server.requests) == 5


def test_a_refused_request_is_not_repeated(server):
    server.answers = [(400, {"error": {"message": "no such model"}})]
    outcome = api(server).propose(brief())
    assert outcome == NoProposal("the API refused the request with status 400")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("I would rather not.", "no whole python block"),
        ("Half:\n```python\nx = 2\n", "no whole python block"),
        ("Same.\n```python\nx = 1\n```", "the champion unchanged"),
        ("Odd.\n```python\nx = '\ud83d'\n```", "not valid Unicode"),
        (None, "the answer holds no text"),
        ([{"type": "text", "text": "```python\nx = 2\n```"}], "the answer holds no text"),
    ],
)
def test_half_answers_are_failed_attempts_that_cost(server, content, reason):
    server.answers = [(200, completion(content))]
    outcome = api(server).propose(brief())
    assert isinstance(outcome, NoProposal)
    assert reason in outcome.reason
    assert outcome.cost.tokens == 1500


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_block_that_an_answer_quotes_before_it_is_cut_off_is_no_candidate(server, reason):
    text = "First\n```python\nimport os\n```\nnow all:\n```python\nx = 2\n"
    server.answers = [(200, completion(text, finish_reason=reason))]
    assert api(server).propose(brief()) == NoProposal(f"the answer was cut off ({reason})", Cost(1500))


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>log in first</html>",
        json.dumps(GOOD).encode()[:60],
        b"[" * 100_000,
        b"\xff\xfe",
        None,
        [1],
        "text",
        {"error": {"message": "overloaded"}},
        {**GOOD, "usage": None, "choices": None},
        {**GOOD, "usage": None, "choices": [{"index": 0, "message": None}]},
        {**GOOD, "usage": None, "choices": {}},
    ],
)
def test_what_is_no_answer_is_a_failed_attempt_that_may_have_cost_everything(server, answer):
    server.answers = [(200, answer)]
    outcome = api(server, prices=(1.0, 2.0), most_tokens=1000).propose(brief())
    assert isinstance(outcome, NoProposal)
    assert "the answer" in outcome.reason
    assert 1000 < outcome.cost.tokens < 3000
    assert 0.002 < outcome.cost.dollars < 0.004


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        [],
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": "10", "completion_tokens": 5},
        {"prompt_tokens": -1000, "completion_tokens": 500},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": 10, "completion_tokens": 10**30},
    ],
)
def test_where_an_answer_does_not_say_its_cost_it_cost_what_it_may_have_cost_at_most(server, usage):
    server.answers = [(200, {**GOOD, "usage": usage})]
    proposal = api(server, most_tokens=1000).propose(brief())
    assert isinstance(proposal, Proposal)
    assert 1000 < proposal.cost.tokens < 3000


@pytest.mark.parametrize("parts", [[b'{"id": "1", "choi'], [b" "] * 10, []])
def test_a_body_that_breaks_off_is_not_asked_for_again_and_cost_the_worst(server, parts):
    server.answers = [(200, iter(parts))]
    outcome = api(server, most_tokens=1000).propose(brief())
    assert isinstance(outcome, NoProposal)
    assert "broke off" in outcome.reason
    assert 1000 < outcome.cost.tokens < 3000
    assert len(server.requests) == 1


def test_errors_behind_which_something_was_written_cost_it_each_time(server):
    server.answers = [(500, {}), (502, {}), (200, GOOD)]
    outcome = api(server, most_tokens=1000).propose(brief())
    assert isinstance(outcome, Proposal)
    assert 2000 + 1500 < outcome.cost.tokens < 6000 + 1500


def test_no_retry_goes_beyond_the_caps(server):
    server.answers = [(500, {})]
    outcome = api(server, most_tokens=1000).propose(brief(tokens=4000))
    assert isinstance(outcome, NoProposal)
    assert outcome.exhausted
    assert outcome.cost.tokens <= 4000
    assert len(server.requests) < 4


@pytest.mark.parametrize("minutes", [10, 0.01])
def test_an_endpoint_that_trickles_for_ever_is_left_at_the_deadline(server, minutes):
    server.answers = [(200, blanks())]
    began = time.monotonic()
    outcome = api(server, most_tokens=1000, timeout=600.0 if minutes < 1 else 0.6).propose(brief(minutes=minutes))
    assert time.monotonic() - began < 5
    assert isinstance(outcome, NoProposal)
    assert outcome.reason.startswith("the API did not answer within")
    assert 1000 < outcome.cost.tokens < 3000
    assert len(server.requests) == 1


def test_a_wait_that_would_end_after_the_deadline_is_not_begun(server):
    server.answers, server.wait = [(429, {})], "60000"
    began = time.monotonic()
    assert api(server, timeout=20.0).propose(brief()) == NoProposal("the API refused the request with status 429")
    assert time.monotonic() - began < 15
    assert len(server.requests) == 1


def test_an_endpoint_that_is_not_there_costs_nothing(monkeypatch):
    monkeypatch.setattr(proposer, "PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    with socket.socket() as taken:  # bound, so that nobody else has the port, and not listening
        taken.bind(("127.0.0.1", 0))
        outcome = Api("m", base_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1").propose(brief())
    assert outcome == NoProposal("the API could not be reached")


def test_a_budget_that_does_not_cover_the_request_stops_before_it(server):
    for options, left in (({}, brief(tokens=1000)), ({"prices": (1.0, 1e3)}, brief(dollars=0.01))):
        outcome = api(server, **options).propose(left)
        assert isinstance(outcome, NoProposal)
        assert outcome.exhausted
    assert server.requests == []


def test_a_missing_key_is_bad_input(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="no key"):
        Api("m")


@pytest.mark.parametrize("url", ["localhost", "http://[::1/v1", "http://127.0.0.1:99999/v1", "http://"])
def test_what_is_no_url_is_bad_input(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    with pytest.raises(UserError, match="--base-url: is no URL"):
        Api("m", base_url=url)
