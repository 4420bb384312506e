"""Any OpenAI-compatible endpoint as a proposer, through the ``openai`` SDK.

The key is read from the environment by the SDK and by nothing else: it is in no brief, log or ledger. Caps on tokens
and dollars are checked before each request with what it may cost at most. That is also what a request costs where
nobody can say: no usage in the answer, an answer that broke off, a deadline that passed. So the SDK repeats nothing
by itself; rate limits, server errors and an endpoint out of reach are tried again here, where each request counts.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from forgetrain.errors import UserError
from forgetrain.forge.proposers.base import Brief, Cost, NoProposal, Proposal

_SYSTEM = (
    "You are an engineer who makes PyTorch training code faster without changing what it computes. Answer with one "
    "line that says what you changed, then the whole new engine.py in one ```python block."
)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n```", re.DOTALL)
RETRIES, PAUSE = 4, 0.5  # seconds before the first one; each next pause is twice as long
_OVERLOADED = (503, 529)  # server errors before anything was written
_LARGEST = 16 << 20  # bytes of an answer


@dataclass(frozen=True)
class _Failure:
    """A request without an answer. ``paid``: something may have been written for it; ``again``: it may go better
    after ``wait`` seconds, if the endpoint says how many."""

    reason: str
    paid: bool = False
    again: bool = False
    wait: float | None = None


class Api:
    """``prices``: dollars for a million prompt tokens and a million completion tokens. ``timeout``: seconds of an
    attempt, all its requests together."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
        most_tokens: int = 32_768,
        timeout: float = 600.0,
    ):
        try:
            import httpx
            import openai
        except ImportError:
            raise UserError("the openai SDK is not installed", remedy="run pip install 'forgetrain[agents]'") from None
        if base_url is not None and not _is_url(base_url):
            remedy = "for example http://localhost:8000/v1"
            raise UserError("is no URL of an API", key="--base-url", value=base_url, remedy=remedy)
        self._openai, self._httpx, self._base_url = openai, httpx, base_url
        try:
            self._client()
        except openai.OpenAIError:
            raise UserError("no key for the model's API", remedy="set OPENAI_API_KEY in the environment") from None
        self._model, self._prices, self._most, self._timeout = model, prices, most_tokens, timeout
        self.name = f"api:{model}"

    def propose(self, brief: Brief) -> Proposal | NoProposal:
        prompt = f"{brief.markdown()}\n## engine.py\n\n```python\n{brief.champion}\n```\n"
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]
        # no tokenizer makes less than three characters a token of code
        worst = self._cost(sum(len(message["content"]) for message in messages) // 3, self._most)
        spent, until = Cost(), time.monotonic() + min(self._timeout, 60 * brief.budget.minutes)
        for retry in range(RETRIES + 1):
            after = spent + worst
            if after.tokens > brief.budget.tokens or after.dollars > brief.budget.dollars > 0:
                reason = "the budget of tokens or dollars does not cover another request"
                return NoProposal(reason, spent, exhausted=True)
            answer = self._request(messages, until - time.monotonic())
            if isinstance(answer, bytes):
                return self._read(answer, brief.champion, spent, worst)
            if answer.paid:
                spent = after
            wait = PAUSE * 2**retry if answer.wait is None else answer.wait
            if not answer.again or retry == RETRIES or time.monotonic() + wait >= until:
                return NoProposal(answer.reason, spent)
            time.sleep(wait)
        raise AssertionError("the last retry returns")

    def _client(self) -> Any:
        return self._openai.AsyncOpenAI(base_url=self._base_url, timeout=None, max_retries=0)

    def _request(self, messages: list[dict[str, str]], seconds: float) -> bytes | _Failure:
        """The answer's body. ``seconds`` hold for the whole of it: the SDK's own limits are for each read, which an
        endpoint that sends a blank now and then never exceeds."""
        openai, httpx = self._openai, self._httpx
        try:
            return asyncio.run(asyncio.wait_for(self._body(messages), seconds))
        except TimeoutError:
            return _Failure(f"the API did not answer within {seconds:.0f} s", paid=True)
        except openai.APIStatusError as error:
            status = error.status_code
            return _Failure(
                f"the API refused the request with status {status}",
                paid=status >= 500 and status not in _OVERLOADED,
                again=status == 429 or status >= 500,
                wait=_asked_to_wait(error.response.headers),
            )
        except (openai.APIConnectionError, httpx.HTTPError) as error:
            if isinstance(error.__cause__, httpx.ConnectError):
                return _Failure("the API could not be reached", again=True)
            return _Failure("the API's answer broke off", paid=True)

    async def _body(self, messages: list[dict[str, str]]) -> bytes:
        body = bytearray()
        async with (
            self._client() as client,
            client.chat.completions.with_streaming_response.create(
                model=self._model, max_completion_tokens=self._most, messages=messages
            ) as response,
        ):
            async for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _LARGEST:
                    break  # what came until here is no whole answer, and is refused as that
        return bytes(body)

    def _read(self, body: bytes, champion: str, spent: Cost, worst: Cost) -> Proposal | NoProposal:
        """What the answer proposes. It may be anything: nothing of it is taken for what it should be."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            return NoProposal("the answer is no JSON", spent + worst)
        counts = [_at(answer, "usage", name) for name in ("prompt_tokens", "completion_tokens")]
        told = all(type(count) is int and 0 < count < 1 << 31 for count in counts)
        cost = spent + (self._cost(*counts) if told else worst)
        ended = _at(answer, "choices", 0, "finish_reason")
        if ended in ("length", "content_filter"):  # its blocks are quotations, or halves
            return NoProposal(f"the answer was cut off ({ended})", cost)
        text = _at(answer, "choices", 0, "message", "content")
        if not isinstance(text, str):
            return NoProposal("the answer holds no text", cost)
        try:
            text.encode()
        except UnicodeEncodeError:
            return NoProposal("the answer is not valid Unicode", cost)
        text = text.replace("\r\n", "\n")
        blocks = _BLOCK.findall(text)
        if not blocks:
            return NoProposal("the answer holds no whole python block", cost)
        source = max(blocks, key=len) + "\n"
        if source == champion:
            return NoProposal("the answer is the champion unchanged", cost)
        message = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
        return Proposal(source, message[:500], cost=cost)

    def _cost(self, prompt: int, completion: int) -> Cost:
        return Cost(prompt + completion, (prompt * self._prices[0] + completion * self._prices[1]) / 1e6)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that cannot be
        return False


def _asked_to_wait(headers: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue  # not there, or a date
        if seconds >= 0:
            return seconds
    return None


def _at(value: Any, *path: str | int) -> Any:
    """What parsed JSON has at the end of a path, None where the path does not lead anywhere."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value
