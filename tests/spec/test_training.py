import pytest

from forgetrain.errors import UserError
from forgetrain.spec.target import load_target, parse_target


@pytest.mark.parametrize(
    ("written", "kept", "seconds"),
    [
        ('"23:30:00"', "23:30:00", 84600),
        ("23:30:00", "23:30:00", 84600),  # TOML reads this as a time of day
        ("90", "1:30:00", 5400),
        ("0.5", "0:00:30", 30),
        ('"1-12:00:00"', "1-12:00:00", 129600),
        ('"2:30"', "2:30", 150),
    ],
)
def test_a_deadline_is_a_duration(written, kept, seconds):
    target = load_target("targets/nano-cpu.toml", [f"train.deadline={written}"])
    assert (target.train.deadline, target.train.deadline_seconds) == (kept, seconds)
    assert parse_target(target.plain()) == target


@pytest.mark.parametrize(
    "written", ["0", '"tomorrow"', '"1:2:3:4"', "true", "-5", "inf", "nan", "1e308", '"9999999999:00"']
)
def test_what_is_no_duration_is_refused(written):
    with pytest.raises(UserError, match=r"train\.deadline"):
        load_target("targets/nano-cpu.toml", [f"train.deadline={written}"])
