from __future__ import annotations

import pytest

from forgetrain.engine.launch import strangers_environment
from forgetrain.numerics.runtime import runtime

WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}


@pytest.mark.parametrize("name", sorted(WAITING))
def test_how_threads_wait_is_the_users_to_decide(monkeypatch, name):
    for other in WAITING:
        monkeypatch.delenv(other, raising=False)
    assert WAITING & set(runtime()) == {"GOMP_SPINCOUNT"}
    monkeypatch.setenv(name, "7")
    for environment in (runtime(), strangers_environment("cpu")):
        assert {key: environment[key] for key in WAITING & set(environment)} == {name: "7"}
