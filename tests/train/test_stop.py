import signal

import pytest

from forgetrain.train import checkpoint
from forgetrain.train.stop import DEADLINE, exit_code
from tests.corpus import built
from tests.engine.toy import toy
from tests.train.test_loop import run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, number):
    before = signal.getsignal(number)
    target, _ = built(tmp_path)
    engine = toy(tmp_path, step=f"if self.steps == 3: os.kill(os.getpid(), {int(number)})")
    summary = run(target, tmp_path, engine=str(engine), unverified=True)
    assert (summary["steps"], summary["interrupted"]) == (3, number.name)
    assert checkpoint.newest(tmp_path / target.name / "checkpoints", warn=pytest.fail).step == 3
    assert signal.getsignal(number) == before


def test_a_deadline_saves_and_stops_after_the_step(tmp_path):
    target, _ = built(tmp_path, recipe={"steps": 100}, train={"deadline": "0:01"})
    summary = run(target, tmp_path, engine=str(toy(tmp_path, step="time.sleep(0.2)")), unverified=True)
    assert summary["interrupted"] == DEADLINE
    assert 2 <= summary["steps"] < 20
    assert checkpoint.newest(tmp_path / target.name / "checkpoints", warn=pytest.fail).step == summary["steps"]


def test_exit_codes():
    assert [exit_code(name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", DEADLINE)] == [130, 143, 138, 124]
