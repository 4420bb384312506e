"""The targets that ship load, say what they should, and can be trained as they are."""

from __future__ import annotations

import itertools
import sys
import tomllib
from pathlib import Path

import pytest

from forgetrain.errors import UserError
from forgetrain.spec.estimate import estimate_target, parameters
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import Target, load_target, parse_target
from forgetrain.spec.toml import to_toml

FILES = sorted((Path(__file__).parents[2] / "targets").glob("*.toml"))


class Interruption(BaseException):
    pass


def interrupted(work, call):
    """What comes out of ``work`` when an interruption falls on its ``call``-th call of Python code; False where it has
    fewer. Ctrl-C is raised wherever the program is, also in what a library calls."""
    calls = 0

    def interrupt(frame, event, _):
        nonlocal calls
        calls += event == "call"
        if calls == call:
            raise Interruption

    sys.setprofile(interrupt)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls >= call


@pytest.mark.parametrize("what", ["load", "plain", "toml"])
def test_an_interruption_is_not_made_another_error(what):
    target = load("nano-cpu")
    file = next(file for file in FILES if file.stem == "nano-cpu")
    work = {"load": lambda: load_target(file), "plain": target.plain, "toml": lambda: to_toml(target)}[what]
    for call in itertools.count(1):
        try:
            if not interrupted(work, call):
                break
        except Interruption:
            pass


def load(name: str, *overrides: str) -> Target:
    return load_target(next(file for file in FILES if file.stem == name), overrides)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_target_that_ships(file):
    target = load_target(file)
    assert target.name == file.stem
    assert estimate_target(target, shard=target.hardware.count > 1).fits in (True, None)
    assert learning_rate(target.recipe, target.recipe.steps - 1) > 0
    # written out and read again it is the same target
    assert parse_target(tomllib.loads(to_toml(target))) == target
    assert parse_target(tomllib.loads(to_toml(target, comment="one\ntwo", defaults=False))) == target


def test_nano_is_minicpm5_shrunk():
    nano, big = load("nano-cpu").model, load("minicpm5-1b-h200").model
    assert 8e6 <= parameters(nano).total <= 12e6
    for model in (nano, big):
        assert model.num_attention_heads * model.head_dim != model.hidden_size
        assert model.num_attention_heads == 8 * model.num_key_value_heads
        assert model.intermediate_size == 3 * model.hidden_size
        assert not model.tie_word_embeddings
    assert (nano.rope_theta, nano.rms_norm_eps) == (big.rope_theta, big.rms_norm_eps)
    assert load("nano-cpu").at_gates_shape().recipe.batch_size == 2


def test_dimensions_of_the_big_ones():
    def dims(name: str) -> tuple[int, ...]:
        m = load(name).model
        return (
            *(m.hidden_size, m.intermediate_size, m.num_hidden_layers, m.num_attention_heads),
            *(m.num_key_value_heads, m.head_dim, m.vocab_size),
        )

    assert dims("minicpm5-1b-h200") == (1536, 4608, 24, 16, 2, 128, 130560)
    assert dims("minicpm4-0.5b-h200") == (1024, 4096, 24, 16, 2, 64, 73448)
    assert dims("minicpm4-8b-h100x8") == (4096, 16384, 32, 32, 2, 128, 73448)
    for name in ("minicpm4-0.5b-h200", "minicpm4-8b-h100x8"):
        model = load(name).model
        assert (model.scale_emb, model.scale_depth, model.dim_model_base) == (12, 1.4, 256)
        assert (model.rope_theta, model.rms_norm_eps, model.architecture) == (1e4, 1e-6, "minicpm")


def test_blocks_are_of_fp8_operands():
    name = "minicpm5-1b-h200-fp8"
    assert load(name).precision.scaling == "tensor"
    assert load(name).plain()["precision"] == {"dtype": "fp8", "scaling": "tensor"}
    assert load(name, "precision.dtype=bf16").plain()["precision"] == {"dtype": "bf16"}
    blocks = load(name, "precision.scaling=block")
    assert blocks.precision.scaling == "block"
    assert blocks.for_reference().precision == load("minicpm5-1b-h200").precision
    with pytest.raises(
        UserError, match=r"precision: scaling = 'block' is of fp8 operands, and dtype = 'bf16'; leave it"
    ):
        load(name, "precision.scaling=block", "precision.dtype=bf16")
    with pytest.raises(UserError, match=r"precision\.scaling: Input should be 'tensor' or 'block'"):
        load(name, "precision.scaling=row")


@pytest.mark.parametrize("name", ["minicpm5-1b-h200", "minicpm4-0.5b-h200", "minicpm4-8b-h100x8"])
def test_production_recipes(name):
    target = load(name)
    recipe = target.recipe
    assert target.precision.dtype == "bf16"
    assert recipe.sequence_length == 4096
    assert recipe.batch_size >= 16 * recipe.micro_batch_size * target.hardware.count


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.lr=inf", r"recipe\.lr: Input should be a finite number \(got inf\)"),
        ("recipe.weight_decay=inf", r"recipe\.weight_decay: Input should be a finite number"),
        ("recipe.beta1=1", r"recipe\.beta1: Input should be less than 1 \(got 1\)"),
        ("recipe.min_lr=1", r"recipe: min_lr = 1 is above lr = 0\.0025, which falls to it"),
        ("model.scale_emb=0", r"model\.scale_emb: Input should be greater than 0"),
        ("gates.g5_relative=nan", r"gates\.g5_relative: Input should be a finite number"),
        ("gates.g4_fp32_ratio=-1", r"gates\.g4_fp32_ratio: Input should be greater than or equal to 0"),
        ("hardware.memory_gib=-1", r"hardware\.memory_gib: Input should be greater than 0"),
        ("model.hidden_size=true", r"model\.hidden_size: Input should be a valid integer \(got True\)"),
        ("recipe.lr=true", r"recipe\.lr: Input should be a valid number \(got True\)"),
        ("model.qk_norm=1", r"model\.qk_norm: Input should be a valid boolean \(got 1\)"),
        ("recipe.seed=-1", r"recipe\.seed: Input should be greater than or equal to 0 \(got -1\)"),
        ("recipe.seed=9223372036854775808", r"recipe\.seed: Input should be less than 9223372036854775808"),
        ("hardware.name=abacus", r"nano-cpu\.toml: hardware\.name: no such hardware \(got 'abacus'\). Choose one of"),
    ],
)
def test_a_number_that_trains_nothing_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_target(next(file for file in FILES if file.stem == "nano-cpu"), [override])


def test_a_time_is_a_seed():
    assert load("nano-cpu", "recipe.seed=1764176400123456789").recipe.seed == 1764176400123456789


@pytest.mark.parametrize(("name", "steps"), [("nano-cpu", 5), ("minicpm4-0.5b-h200", 100)])
def test_trainings_of_gates_warm_up_as_the_recipe_does_as_far_as_they_go(name, steps):
    assert load(name).gates_warm_up == steps
