"""Any OpenAI-compatible endpoint as a proposer, through the ``openai`` SDK.

The key is read from the environment by the SDK and by nothing else: it is in no brief, log or ledger. The SDK backs
off on rate limits and server errors; a request that is refused for what it says is not repeated. Caps on tokens and
dollars are checked before each request, with what the request may cost at most.
"""

from __future__ import annotations

import re

from forgetrain.errors import UserError
from forgetrain.forge.proposers.base import Brief, Cost, NoProposal, Proposal

_SYSTEM = (
    "You are an engineer who makes PyTorch training code faster without changing what it computes. Answer with one "
    "line that says what you changed, then the whole new engine.py in one ```python block."
)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n```", re.DOTALL)


class Api:
    """``prices``: dollars for a million prompt tokens and a million completion tokens."""

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
            import openai
        except ImportError:
            raise UserError("the openai SDK is not installed", remedy="run pip install 'forgetrain[agents]'") from None
        self._openai = openai
        try:
            self._client = openai.OpenAI(base_url=base_url, timeout=timeout, max_retries=4)
        except openai.OpenAIError:
            raise UserError("no key for the model's API", remedy="set OPENAI_API_KEY in the environment") from None
        self._model, self._prices, self._most = model, prices, most_tokens
        self.name = f"api:{model}"

    def propose(self, brief: Brief) -> Proposal | NoProposal:
        prompt = f"{brief.markdown()}\n## engine.py\n\n```python\n{brief.champion}\n```\n"
        worst = len(prompt) // 3 + self._most  # no tokenizer makes less than three characters a token of code
        dollars = self._dollars(len(prompt) // 3, self._most)
        if worst > brief.budget.tokens or dollars > brief.budget.dollars > 0:
            return NoProposal("the budget of tokens or dollars does not cover another request", exhausted=True)
        try:
            answer = self._client.chat.completions.create(
                model=self._model,
                max_completion_tokens=self._most,
                messages=[{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}],
            )
        except self._openai.APIStatusError as error:
            return NoProposal(f"the API refused the request with status {error.status_code}")
        except self._openai.APIConnectionError:
            return NoProposal("the API could not be reached, or did not answer in time")
        usage = answer.usage
        cost = Cost()
        if usage is not None:
            spent = self._dollars(usage.prompt_tokens, usage.completion_tokens)
            cost = Cost(usage.prompt_tokens + usage.completion_tokens, spent)
        text = (answer.choices[0].message.content or "") if answer.choices else ""
        blocks = _BLOCK.findall(text)
        if not blocks:
            return NoProposal("the answer holds no whole python block", cost)
        source = max(blocks, key=len) + "\n"
        if source == brief.champion:
            return NoProposal("the answer is the champion unchanged", cost)
        message = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
        return Proposal(source, message[:500], cost=cost)

    def _dollars(self, prompt: int, completion: int) -> float:
        return (prompt * self._prices[0] + completion * self._prices[1]) / 1e6
