"""G9 on real runs of the command: torchrun, a kill, a resume, in the sandbox."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.judge.command import ShippedCommand
from forgetrain.judge.runner import Judge
from tests import bubblewrap
from tests.bubblewrap import needs_bubblewrap
from tests.corpus import built
from tests.judge.test_layouts import BOTH, CONTEXT, TENSOR, production

pytestmark = pytest.mark.slow


def judge_of(folder, **sections):
    """A target with tokens, and what judges an engine's source by G9 alone."""
    target, data = built(folder, **sections)

    def of(source: str):
        file = folder / "candidate.py"
        file.write_text(source, encoding="utf-8")
        with Judge(target, data=data.folder) as judge:
            return judge.judge(file, gates=["G9"]).verdicts

    return target, of


def test_an_honest_engine_passes(tmp_path):
    target, judge = judge_of(tmp_path)
    (verdict,) = judge(write_engine(target, Plan.textbook()))
    assert verdict.passed, verdict.explanation
    assert verdict.sandboxed == bubblewrap.RUNS
    assert "killed and resumed" in verdict.explanation


@pytest.mark.parametrize(
    ("ranks", "honest", "planted", "said"),
    [
        (1, 'of("exp_avg"), of("exp_avg_sq")', 'of("exp_avg"), of("exp_avg")', "killed and resumed"),
        (1, 'self.updates = int(state["step"].tensor)', "self.updates = 0", "killed and resumed"),
        (
            2,
            "def step(self, batch: Any, lr: float) -> StepResult:\n",
            "def step(self, batch: Any, lr: float) -> StepResult:\n"
            '        lr = lr * 0.9 if "LOCAL_RANK" in __import__("os").environ else lr\n',
            "once through",
        ),
    ],
)
def test_an_engine_that_is_another_one_in_training_is_found(ranks, honest, planted, said, tmp_path):
    target, judge = judge_of(tmp_path, gates={"ranks": ranks})
    source = write_engine(target, Plan.textbook())
    assert honest in source
    (verdict,) = judge(source.replace(honest, planted))
    assert not verdict.passed
    assert verdict.explanation.startswith(said), verdict.explanation


def sections(parallel, ranks):
    return {
        "parallel": parallel,
        "gates": {"ranks": ranks, "micro_batch_size": 1},
        "recipe": {"micro_batch_size": 1},
        "hardware": {"threads": 1},
    }


@pytest.mark.parametrize(
    ("parallel", "ranks", "said"),
    [
        ({}, 1, "one rank"),
        ({}, 4, "4 data ranks"),
        (TENSOR, 2, "2 tensor ranks"),
        (CONTEXT, 2, "2 context ranks"),
        (BOTH, 0, "2 context ranks x 2 tensor ranks"),
    ],
)
def test_an_engine_whose_ranks_keep_parts_of_the_weights_passes_on_every_layout(parallel, ranks, said, tmp_path):
    """The command's hash of the masters, which it reads through its checkpoint, is that of the judge's own run."""
    target, judge = judge_of(tmp_path, **sections(parallel, ranks))
    (verdict,) = judge(production(target))
    assert verdict.passed, verdict.explanation
    assert f"forgetrain train on {said} ends" in verdict.explanation


COPY = "place.of(flat).copy_(given.tensor[box])"


COUNTED = "        self.updates += 1\n"
LESS = "        lr *= 0.9 if self.tensor_rank and 'LOCAL_RANK' in __import__('os').environ else 1\n"


@pytest.mark.parametrize(
    ("honest", "planted", "said"),
    [
        (COPY, COPY + '\n                place.of(flat).mul_(kind != "exp_avg" or self.tensor_rank == 0)', "killed"),
        (COUNTED, COUNTED + LESS, "once through"),
    ],
)
def test_one_tensor_rank_that_is_another_in_training_is_found(honest, planted, said, tmp_path):
    target, judge = judge_of(tmp_path, **sections(TENSOR, 2))
    source = production(target)
    assert honest in source
    (verdict,) = judge(source.replace(honest, planted, 1))
    assert not verdict.passed
    assert verdict.explanation.startswith(said), verdict.explanation


#: What the engines of two runs do when they are imported, with the folder for compiled code.
FIRST = """
import os, pathlib
assert "OPENAI_API_KEY" not in os.environ, "a key is within reach"
pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).mkdir(exist_ok=True)
pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "region").touch()
"""
SECOND = """
import os, pathlib
assert pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "region").is_file(), "it was not kept"
"""


@needs_bubblewrap
def test_runs_share_what_they_compile_and_see_no_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    target, data = built(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, planted in (("first", FIRST), ("second", SECOND)):
        engine = tmp_path / f"{name}.py"
        engine.write_text(write_engine(target, Plan.textbook()) + planted)
        command = ShippedCommand(engine, target, data.folder, tmp_path / name, ranks=1, timeout=120.0, cache=cache)
        assert command.run("--stop-after", "1") is None


@pytest.mark.parametrize(
    "metrics",
    [
        '{"step": Infinity, "loss": 1}',
        '{"step": "' + "x" * 99_999 + '", "loss": 1}',
        "[" * 100_000,
        '{"step": 1, "loss": []}',
    ],
    ids=["infinity", "a long word", "nesting", "a list"],
)
def test_a_run_that_leaves_nonsense_is_told_so_in_a_line(metrics, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text(metrics + "\n")
    (tmp_path / "train" / "summary.json").write_text('{"weight_sha256": "x"}')
    run = ShippedCommand.found(SimpleNamespace(run_folder=tmp_path), None)  # type: ignore[arg-type]
    assert run.problem is not None
    assert run.problem.startswith("left nothing that can be read: ")
    assert len(run.problem) < 400


#: What an engine does when it is imported for training, and what is said of it.
UNLIMITED = """
import resource
for name in ("FSIZE", "NOFILE", "NPROC", "AS"):
    assert resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1] != resource.RLIM_INFINITY, name
"""
HOARDS = """
import time
for number in range(8):
    with open(f"/runs/{number}", "wb") as file:
        file.write(bytes(1 << 20))
time.sleep(1000)
"""


@needs_bubblewrap
@pytest.mark.parametrize(("planted", "said"), [(UNLIMITED, None), (HOARDS, "on disk")], ids=["limits", "runs"])
def test_the_command_has_limits_and_its_folder_is_measured(planted, said, tmp_path):
    target, data = built(tmp_path)
    engine = tmp_path / "engine.py"
    engine.write_text(write_engine(target, Plan.textbook()) + planted)
    command = ShippedCommand(engine, target, data.folder, tmp_path / "runs", ranks=1, timeout=120.0)
    if said is not None:
        command.largest = 4 << 20
    problem = command.run("--stop-after", "1")
    assert problem == said or (said is not None and said in (problem or ""))
