"""G8: the peak of memory is within the target's budget."""

from __future__ import annotations

from forgetrain.gates.verdict import Verdict

_GIB = 2**30


def g8(peak_bytes: int, budget_gib: float, *, sandboxed: bool = False) -> Verdict:
    """``peak_bytes``: what the judge measured over all ranks of one machine; ``budget_gib``: the target's memory."""
    peak = peak_bytes / _GIB
    measured = peak_bytes > 0
    text = f"peak {peak:.2f} GiB of {budget_gib:.2f} GiB"
    return Verdict(
        "G8",
        measured and peak <= budget_gib,
        peak,
        budget_gib,
        budget_gib - peak,
        explanation=text if measured else "no memory was measured",
        sandboxed=sandboxed,
    )
