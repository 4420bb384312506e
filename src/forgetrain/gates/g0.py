"""G0: the reference itself is judged before anything is held to it.

Repeatable truth may still be wrong: a training loop that forgets zero_grad() is bit-equal to itself. So besides two
runs being equal, what the reference's first two updates did is compared, in fp32, with the float64 oracle, started
each time from the reference's own weights, and with another reference where there is one that has the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forgetrain.gates.g2 import StepRecord, first_parting
from forgetrain.gates.verdict import Verdict
from forgetrain.numerics.compare import exact

#: Largest relative RMS error of a parameter's clipped gradient in fp32. Right code was measured below 2e-5 on models
#: of up to 8 layers, and every defect of use 1e-2 and more, so the gate is between.
NEAR = 1e-3


def relative_errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """‖actual - expected‖ / ‖expected‖ of each tensor, in float64; a missing tensor or NaN counts as infinite."""
    errors = {}
    for name, due in expected.items():
        found = actual.get(name)
        error = torch.inf
        if found is not None and found.shape == due.shape:
            truth = due.double()
            distance, scale = (exact(found, due.device) - truth).norm(), truth.norm()
            error = float(distance / scale) if scale > 0 else float(distance)
        errors[name] = error if error == error else torch.inf
    return errors


def g0(
    runs: Mapping[str, tuple[Sequence[StepRecord], Sequence[StepRecord]]],
    unequal: Mapping[str, str],
    errors: Mapping[str, Mapping[str, float]],
    skipped: Sequence[str] = (),
) -> Verdict:
    """
    Args:
        runs: two trajectories of the reference by what they are called ("world size 1", ...).
        unequal: evidence of the first step that differs between two runs, by name, in words.
        errors: relative errors of clipped gradients by tensor, by what was compared ("oracle, step 0", ...).
        skipped: what could not be compared, and why.

    ``statistic`` is the largest error, ``threshold`` what it may be.
    """
    detail = {"errors": {what: max(by.values(), default=0.0) for what, by in errors.items()}, "skipped": list(skipped)}
    for name, (first, second) in runs.items():
        parting = first_parting(first, second)
        if parting is not None or not first:
            why = f"{name}: two runs of the reference are not bit-equal: {parting or 'nothing was run'}"
            return Verdict("G0", False, detail=detail, explanation=why)
    if unequal:
        tap, words = next(iter(unequal.items()))
        why = f"two runs of the reference differ in {tap}: {words}"
        return Verdict("G0", False, first_divergence=tap, detail=detail, explanation=why)
    worst = max(((e, name, what) for what, by in errors.items() for name, e in by.items()), default=None)
    if worst is None:
        return Verdict("G0", False, detail=detail, explanation="the reference was compared with no oracle")
    error, name, what = worst
    steps = ", ".join(f"{len(first)} steps at {label}" for label, (first, _) in runs.items())
    where = f"its largest relative error is {error:.2e} ({name}; {what}), allowed {NEAR:.0e}"
    passed = error <= NEAR
    text = (
        f"the reference, run twice, is bit-equal over {steps}; {where}"
        if passed
        else f"the reference is wrong: {where}"
    )
    if skipped:
        text += f"; not compared: {'; '.join(skipped)}"
    first = None if passed else f"{name}#clipped"
    return Verdict("G0", passed, error, NEAR, NEAR - error, first_divergence=first, detail=detail, explanation=text)
