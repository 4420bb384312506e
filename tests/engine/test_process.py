"""Engines in processes of their own: the contract holds, and no way of breaking it goes unnoticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from forgetrain.engine import tree
from forgetrain.engine.contract import weight_hash
from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineFailure, EngineProcess
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.numerics.compare import difference
from forgetrain.numerics.init import initial_weights
from tests.engine.toy import toy
from tests.tiny import random_batch, tiny_target

TARGET = tiny_target()
BATCH = random_batch(TARGET, 1)
WEIGHTS = initial_weights(TARGET.model, 0)


def gone(pid: int, seconds: float = 2.0) -> bool:
    for _ in range(int(seconds / 0.02)):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_written_engine_behaves_as_in_this_process(tmp_path, dtype):
    target = tiny_target(precision={"dtype": dtype})
    path = tmp_path / "engine.py"
    path.write_text(write_engine(target, Plan.textbook()))
    torch.use_deterministic_algorithms(True)
    here = load_engine(path).build(target.plain(), device="cpu", precision=dtype, mesh=None)
    here.load(WEIGHTS)
    with EngineProcess(path, target) as there:
        there.load(WEIGHTS)
        for (name, want), (got_name, got) in zip(here.probe(BATCH), there.probe(BATCH), strict=True):
            assert name == got_name
            assert difference(want, got) is None
        next(iter(there.probe(BATCH)))  # a probe that is left early leaves nothing behind
        for lr in (1e-2, 5e-3):
            want, got = here.step(BATCH, lr), there.step(BATCH, lr)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert torch.equal(here.loss(BATCH), there.loss(BATCH))
        state = there.state()
        assert weight_hash(state) == weight_hash(here.state())
        there.step(BATCH, 1e-2)
        there.restore(state)
        assert all(difference(here.state()[k].tensor, v.tensor) is None for k, v in there.state().items())
        assert there.peak_memory() > 1 << 20
        pid = there._process.pid
    torch.use_deterministic_algorithms(False)
    assert gone(pid)


def test_two_ranks_equal_one_engine_that_sums_over_them(tmp_path):
    path = tmp_path / "engine.py"
    path.write_text(write_engine(TARGET, Plan.textbook()))
    with EngineProcess(path, TARGET, ranks=2, threads=1) as both, EngineProcess(path, TARGET, threads=1) as one:
        for engine in (both, one):
            engine.load(WEIGHTS)
        batch = random_batch(TARGET, 3, documents=True)
        a, b = both.step(batch, 1e-2), one.step(batch, 1e-2)
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.grad_norm, b.grad_norm)
        torch.testing.assert_close(both.loss(batch), one.loss(batch))
        assert len(list(both.probe(batch))) == 110  # the first rank's single micro-batch
        with pytest.raises(UserError, match="divide"):
            both.step(batch._replace(tokens=batch.tokens[:3]), 1e-2)


def test_shards_are_put_together(tmp_path):
    with EngineProcess(toy(tmp_path), TARGET, ranks=2) as engine:
        engine.load(WEIGHTS)
        engine.step(BATCH, 0.5)
        for name, shard in engine.state().items():
            if name.startswith("master/"):
                assert torch.equal(shard.tensor, WEIGHTS[name[7:]] * 0.5)
        state = engine.state()
        engine.restore(state)
        assert weight_hash(engine.state()) == weight_hash(state)


HANG = "time.sleep(1000)"
SPIN = "\n        while True: print('x' * 1000)"
RESULT = "return StepResult(%s, torch.tensor(1.0), torch.tensor(True))"
CHANNEL = "for fd in range(3, 1000): os.path.exists(f'/proc/self/fd/{fd}') and "


def test_ranks_share_the_threads_that_the_target_has(tmp_path):
    """Each with all of them waited busily for the others: a step of two ranks took three times as long."""
    engine = toy(tmp_path, step=RESULT % "torch.tensor(float(torch.get_num_threads()))")
    for count, ranks, due in ((1, 1, 4), (1, 2, 2), (2, 2, 4), (1, 4, 1), (2, 1, 4)):
        target = tiny_target(hardware={"threads": 4, "count": count})
        with EngineProcess(engine, target, ranks=ranks) as process:
            process.load(WEIGHTS)
            assert float(process.step(BATCH, 0.0).loss) == due


def slow(*values: object) -> object:
    """A case that repeats what a faster suite has seen in another place."""
    return pytest.param(*values, marks=pytest.mark.slow)


#: (where, what the engine does there, the kind of the failure, words of its message)
ILL = [
    ("build", "raise ValueError('no such head')", "raised", "ValueError: no such head"),
    slow("build", "sys.exit(3)", "crashed", "exit code 3"),
    ("step", "os._exit(7) if self.steps == 3 else None", "crashed", "exit code 7"),
    slow("step", "os.kill(os.getpid(), 11)", "crashed", "SIGSEGV"),
    slow("step", "print('boom', file=sys.stderr, flush=True); os._exit(1)", "crashed", "boom"),
    ("step", HANG, "timeout", "no answer"),
    slow("step", SPIN, "timeout", "no answer"),
    slow("step", RESULT % "torch.ones(2)", "garbage", "loss is"),
    ("step", RESULT % "torch.tensor(1.0).double()", "garbage", "float64"),
    slow("step", RESULT % "torch.empty((), device='meta')", "raised", "meta"),
    slow("step", "return 1.0", "raised", "AttributeError"),
    ("step", CHANNEL + "os.write(fd, b'garbage' * 99)", "garbage", "expected a message"),
    slow("step", CHANNEL + "os.close(fd)", "crashed", "engine"),
    ("state", "shards['extra'] = shards['step']", "garbage", "extra"),
    slow("state", "del shards['exp_avg/model.norm.weight']", "garbage", "exp_avg/model.norm.weight leave out 32"),
    slow("state", "shards['step'] = Shard(torch.tensor(1.0), (), ())", "garbage", "step is"),
    slow("state", "shards['step'] = Shard(torch.zeros(3, dtype=torch.int64), (3,), (0,))", "garbage", "step is"),
    ("state", "shards['step'] = Shard(torch.tensor(-100_000), (), ())", "garbage", "step is -100000"),
    slow("state", "shards['step'] = Shard(torch.tensor(2**40), (), ())", "garbage", "step is 1099511627776"),
    ("probe", "yield from [('t', torch.zeros(1))] * 100000", "garbage", "more than"),
    slow("probe", "yield 't', torch.zeros(1 << 24)", "garbage", "at most"),
]


def drive(path: Path, seen: list[int], timeout: float) -> None:
    with EngineProcess(path, TARGET, timeout=timeout) as engine:
        seen.append(engine._process.pid)
        engine.load(WEIGHTS)
        for _ in range(5):
            engine.step(BATCH, 0.1)
        list(engine.probe(BATCH))
        engine.state()


@pytest.mark.parametrize(("where", "what", "kind", "words"), ILL)
def test_an_ill_behaved_engine_is_named_and_killed(tmp_path, where, what, kind, words):
    pids: list[int] = []
    with pytest.raises(EngineFailure, match=words) as failure:
        drive(toy(tmp_path, **{where: what}), pids, 3 if kind == "timeout" else 30)
    assert failure.value.kind == kind
    assert all(gone(pid) for pid in pids)


def test_of_what_an_engine_says_was_raised_the_end_is_kept(tmp_path):
    forge = "import gc; own = next(o for o in gc.get_objects() if type(o).__name__ == 'Channel'); "
    forge += "own.send('error', {'text': 'x' * (8 << 20) + 'end'}); time.sleep(100)"
    with EngineProcess(toy(tmp_path, step=forge), TARGET) as engine:
        engine.load(WEIGHTS)
        with pytest.raises(EngineFailure) as failure:
            engine.step(BATCH, 0.1)
    assert failure.value.kind == "raised"
    assert failure.value.detail.endswith("xend")
    assert len(failure.value.detail) < 10_000
    assert len(str(failure.value)) < 500


def test_an_engine_that_cannot_be_watched_does_not_go_on(tmp_path, monkeypatch):
    def excess(*_):
        raise RecursionError

    monkeypatch.setattr(tree, "excess", excess)
    with (
        pytest.raises(EngineFailure, match="cannot be watched: RecursionError") as failure,
        EngineProcess(toy(tmp_path, step=HANG), TARGET, limits={"processes": 100}, timeout=30) as engine,
    ):
        some_steps(engine)
    assert failure.value.kind == "limit"


def test_printing_disturbs_nothing_and_is_kept_bounded(tmp_path):
    path = toy(tmp_path, step="print('x' * 300000); os.write(1, b'\\x00\\x1b[2J end'); sys.stderr.write('warned')")
    with EngineProcess(path, TARGET) as engine:
        engine.load(WEIGHTS)
        engine.step(BATCH, 0.1)
        time.sleep(0.1)
        out, err = engine.printed()
        assert len(out) <= 1 << 16
        assert out.endswith("\ufffd\ufffd[2J end")
        assert err == "warned"


@pytest.mark.slow
@pytest.mark.parametrize("other", ["None", "exec('raise RuntimeError(0)')"], ids=["waits for it", "complains of it"])
def test_a_rank_that_dies_ends_the_other(tmp_path, other):
    path = toy(tmp_path, step=f"(exec('import time; time.sleep(0.3)'), os._exit(9)) if self.rank == 1 else {other}")
    started = time.monotonic()
    with EngineProcess(path, TARGET, ranks=2) as engine:
        engine.load(WEIGHTS)
        with pytest.raises(EngineFailure, match="exit code 9"):
            engine.step(BATCH, 0.1)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_ranks_that_disagree_are_refused(tmp_path):
    path = toy(tmp_path, after="loss = loss + self.rank")
    with EngineProcess(path, TARGET, ranks=2) as engine:
        engine.load(WEIGHTS)
        with pytest.raises(EngineFailure, match="different values of loss"):
            engine.step(BATCH, 0.1)


#: A step after which a thread works on for ever.
BUSY = "import threading; threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()"


def test_a_paused_engine_uses_no_time(tmp_path):
    with EngineProcess(toy(tmp_path, step=BUSY), TARGET) as engine:
        engine.load(WEIGHTS)
        engine.step(BATCH, 0.1)
        engine.pause()
        time.sleep(0.05)
        before = engine.usage().cpu_seconds
        time.sleep(0.3)
        assert engine.usage().cpu_seconds - before <= 0.03
        engine.resume()
        engine.step(BATCH, 0.1)


def test_an_engine_that_works_while_it_is_stopped_is_found(tmp_path):
    with EngineProcess(toy(tmp_path, step=BUSY), TARGET) as engine:
        engine.load(WEIGHTS)
        engine.step(BATCH, 0.1)
        engine.pause()
        os.kill(engine._process.pid, signal.SIGCONT)  # as a timer of its own can
        time.sleep(0.4)
        with pytest.raises(EngineFailure, match=r"used 0\.\d+ s of a processor while it was stopped for 0\.\d+ s"):
            engine.resume()


def some_steps(engine: EngineProcess) -> None:
    engine.load(WEIGHTS)
    for _ in range(3):
        engine.step(BATCH, 0.1)
        time.sleep(0.4)


FORKS = "\n        for _ in range(60):\n            if os.fork() == 0: time.sleep(100)"


@pytest.mark.parametrize(
    ("step", "limits", "words"),
    [
        slow(FORKS, {"processes": 20}, "20 are allowed"),
        ("self.kept = torch.ones(3 << 28)", {"AS": 6 << 30, "resident": 1 << 30}, "1.0 are allowed"),
        slow("torch.ones(1 << 34)", {"AS": 6 << 30}, "can't allocate memory"),
        slow("open('/dev/shm/ftest', 'wb').write(bytes(2 << 20))", {"FSIZE": 1 << 20}, "File too large|SIGXFSZ"),
    ],
)
def test_limits(tmp_path, step, limits, words):
    with (
        EngineProcess(toy(tmp_path, step=step), TARGET, limits=limits) as engine,
        pytest.raises(EngineFailure, match=words),
    ):
        some_steps(engine)
    Path("/dev/shm/ftest").unlink(missing_ok=True)


def test_a_strangers_file_sees_little_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with EngineProcess(toy(tmp_path, build="assert 'OPENAI_API_KEY' not in os.environ"), TARGET):
        pass


def test_no_such_file():
    with pytest.raises(UserError, match="no such engine"):
        EngineProcess("nowhere/engine.py", TARGET)
    with pytest.raises(EngineFailure, match="No module named 'nowhere'"):
        EngineProcess("nowhere.engine", TARGET)


def test_it_dies_with_its_parent(tmp_path):
    """A parent that is killed at once takes a busy engine with it."""
    path = toy(tmp_path, step=HANG)
    script = (
        "from tests.engine.test_process import *\n"
        f"with EngineProcess({str(path)!r}, TARGET) as engine:\n"
        "    engine.load(WEIGHTS)\n"
        "    print(engine._process.pid, flush=True)\n"
        "    engine.step(BATCH, 0.1)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
    assert gone(pid)


@pytest.mark.parametrize("says", ["", "DETERMINISTIC = False\n"])
def test_an_engine_that_is_not_deterministic_says_so_and_is_not_asked_to_be(tmp_path, says):
    path = toy(tmp_path, build=f"assert torch.are_deterministic_algorithms_enabled() is {not says}")
    path.write_text(path.read_text() + says)
    with EngineProcess(path, TARGET) as engine:
        assert engine.deterministic is not bool(says)


@pytest.mark.parametrize("ranks", [1, 2])
def test_determinism_is_asked_for_without_importing_the_compiler_and_reaches_it_when_it_is(tmp_path, ranks):
    path = toy(
        tmp_path,
        build="import sys; assert 'torch._inductor' not in sys.modules; from torch._inductor import config; "
        "assert config.deterministic",
    )
    with EngineProcess(path, TARGET, ranks=ranks) as engine:
        assert engine.deterministic


def test_ranks_are_forked_when_torch_was_imported(tmp_path):
    path = toy(tmp_path, build="assert b'serve.py' in open(f'/proc/{os.getppid()}/cmdline', 'rb').read()")
    with EngineProcess(path, TARGET, ranks=2):
        pass
