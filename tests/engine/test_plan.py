import pytest

from forgetrain.engine.plan import Plan, choices
from forgetrain.errors import UserError
from tests.tiny import tiny_target


def test_a_plan_survives_its_file(tmp_path):
    plan = Plan.textbook().with_choice("attention", "sdpa").with_choice("qkv", "grouped")
    (tmp_path / "plan.toml").write_text(plan.toml())
    assert Plan.read(tmp_path / "plan.toml") == plan
    assert plan != Plan.textbook()


def test_the_textbook_plan_takes_each_first_option():
    plan = Plan.textbook()
    assert all(plan[key] == options[0] for key, options in choices(tiny_target()).items())


def test_choices_leave_out_ops_that_the_model_lacks():
    assert "qk_norm" not in choices(tiny_target())
    assert "qk_norm" in choices(tiny_target("qwen3"))
    assert "mup" in choices(tiny_target("minicpm4"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("attention =", "not valid TOML"),
        ('atention = "sdpa"', "no such plan key"),
        ('attention = "sdp"', "no such choice"),
    ],
)
def test_a_bad_plan_is_refused(text, problem, tmp_path):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UserError, match=rf"plan\.toml: .*{problem}"):
        Plan.read(tmp_path / "plan.toml")


def test_a_missing_plan_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such plan"):
        Plan.read(tmp_path / "plan.toml")
