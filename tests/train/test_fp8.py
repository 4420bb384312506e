"""Training of fp8 targets: with engines that compute in fp8 alone, and a speed that claims no MFU."""

from types import SimpleNamespace
from typing import cast

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.forge.collect import check_reference
from forgetrain.spec.estimate import roofline
from forgetrain.spec.stages import stages_of
from forgetrain.spec.target import load_target
from forgetrain.train.speed import Speed
from forgetrain.train.verified import choose_engine
from forgetrain.train.world import World
from tests.spec.test_estimate import TARGETS
from tests.tiny import tiny_target

TARGET = tiny_target(precision={"dtype": "fp8"})


def test_the_textbook_engine_of_an_fp8_target_computes_in_fp8(tmp_path):
    chosen = choose_engine(TARGET, tmp_path, None, unverified=False)
    engine, _ = chosen.build(TARGET, device="cpu", mesh=None)
    assert "linear_fp8_forward" in (tmp_path / "train" / "engine.py").read_text()
    assert engine is not None


@pytest.mark.parametrize("engine", ["transformers", "hopper"])
def test_an_engine_of_another_precision_is_one_line(engine, tmp_path):
    if engine == "hopper":
        path = tmp_path / "hopper.py"
        path.write_text(write_engine(TARGET.for_reference(), Plan({"schedule": "hopper"})))
        engine = str(path)
    with pytest.raises(UserError, match="computes in fp32 and bf16, the target in fp8") as refused:
        choose_engine(TARGET, tmp_path, engine, unverified=True).build(TARGET, device="cpu", mesh=None)
    assert refused.value.key == "precision.dtype"


def test_there_is_nothing_to_collect():
    with pytest.raises(UserError, match="no reference computes in fp8"):
        check_reference(TARGET)


def test_the_speed_is_a_share_of_the_floor():
    target = load_target(TARGETS / "minicpm5-1b-h200-fp8.toml")
    speed = Speed(target, cast(World, SimpleNamespace(device="cuda", size=1)), stages_of(target), 0)
    roof = roofline(target)
    rate = 128 * 4096 / (roof.products + roof.attention) / 2
    shares = speed.shares(rate, 4096)
    assert shares == {"floor_share": 0.5}
    assert speed.text(rate, shares) == f"{rate:,.0f} tok/s  50% of the floor"
