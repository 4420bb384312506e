import pytest

from forgetrain.gates.g9 import TrainingRun, g9

DUE = [2.0, 1.5, 1.25]
LOSSES = dict(enumerate(DUE, 1))


def judged(run, tolerance=None):
    runs = {"once through": TrainingRun(LOSSES, "aa"), "killed and resumed": run}
    return g9(DUE, "aa", runs, layout="2 data ranks", tolerance=tolerance)


def test_equal_runs_pass():
    verdict = judged(TrainingRun(LOSSES, "aa"))
    assert verdict.passed
    assert "2 data ranks" in verdict.explanation


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (TrainingRun(LOSSES, "bb"), "last weights"),
        (TrainingRun(LOSSES, None), "last weights"),  # one that keeps its weights to itself
        (TrainingRun({**LOSSES, 3: 1.2500001}, "aa"), "step 3"),
        (TrainingRun({1: 2.0, 2: 1.5}, "aa"), "2 steps"),
        (TrainingRun({**LOSSES, 3: float("nan")}, "aa"), "step 3"),
        (TrainingRun({}, None, "exit code 1; out of memory"), "out of memory"),
    ],
)
def test_what_differs_is_named_with_the_run(run, said):
    verdict = judged(run)
    assert not verdict.passed
    assert said in verdict.explanation
    assert verdict.explanation.startswith("killed and resumed: ")


def test_an_engine_that_is_not_deterministic_is_held_to_its_losses():
    near, far = ({**LOSSES, 3: loss} for loss in (1.2501, 1.3))
    assert judged(TrainingRun(near, "bb"), tolerance=1e-3).passed
    assert not judged(TrainingRun(far, "bb"), tolerance=1e-3).passed
