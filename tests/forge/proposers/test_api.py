"""The API is a real HTTP server on the loopback interface that speaks the protocol, and breaks it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from forgetrain.errors import UserError
from forgetrain.forge.proposers.api import Api
from forgetrain.forge.proposers.base import NoProposal, Proposal
from tests.forge.proposers.briefs import brief


def completion(text):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500},
    }


@pytest.fixture
def server(monkeypatch):
    """A server whose ``answers`` are (status, body) in turn, the last one for ever; it keeps the requests."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answers, requests = self.server.answers, self.server.requests
            requests.append(json.loads(body))
            status, answer = answers[0] if len(answers) == 1 else answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() if not isinstance(answer, bytes) else answer)

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.answers = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def api(server, **options):
    return Api("m", base_url=f"http://127.0.0.1:{server.server_port}/v1", **options)


def test_the_block_in_the_answer_is_the_candidate(server):
    server.answers = [(200, completion("Fused two loops.\n\n```python\nx = 2\n```\n"))]
    proposal = api(server, prices=(1.0, 2.0)).propose(brief(dollars=5.0))
    assert isinstance(proposal, Proposal)
    assert (proposal.source, proposal.message) == ("x = 2\n", "Fused two loops.")
    assert (proposal.cost.tokens, proposal.cost.dollars) == (1500, 0.002)
    assert "x = 1" in server.requests[0]["messages"][1]["content"]
    assert "sk-secret" not in json.dumps(server.requests)


def test_rate_limits_and_server_errors_are_tried_again(server):
    server.answers = [(429, {}), (503, {}), (200, completion("Yes.\n```python\nx = 2\n```"))]
    assert isinstance(api(server).propose(brief()), Proposal)
    assert len(server.requests) == 3


def test_a_refused_request_is_not_repeated(server):
    server.answers = [(400, {"error": {"message": "no such model"}})]
    outcome = api(server).propose(brief())
    assert outcome == NoProposal("the API refused the request with status 400")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I would rather not.", "no whole python block"),
        ("Half:\n```python\nx = 2\n", "no whole python block"),
        ("Same.\n```python\nx = 1\n```", "the champion unchanged"),
    ],
)
def test_half_answers_are_failed_attempts_that_cost(server, text, reason):
    server.answers = [(200, completion(text))]
    outcome = api(server).propose(brief())
    assert isinstance(outcome, NoProposal)
    assert reason in outcome.reason
    assert outcome.cost.tokens == 1500


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
