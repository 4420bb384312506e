"""What a candidate can reach from inside the sandbox, and that honest engines do not notice it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from forgetrain.engine.contract import weight_hash
from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineFailure, EngineProcess
from forgetrain.engine.write import write_engine
from forgetrain.judge import sandbox as module
from forgetrain.judge.sandbox import fill_cache, sandbox
from forgetrain.numerics.init import initial_weights
from tests.bubblewrap import needs_bubblewrap
from tests.engine.toy import toy
from tests.tiny import random_batch, tiny_target

TARGET = tiny_target()
WEIGHTS = initial_weights(TARGET.model, 0)


def steps(path: Path, boxed: bool, ranks: int = 1) -> tuple[list[float], str]:
    box = sandbox(path, TARGET)
    assert box.sandboxed
    with EngineProcess(path, TARGET, ranks=ranks, wrap=box.wrap if boxed else None, limits=box.limits) as engine:
        engine.load(WEIGHTS)
        losses = [engine.step(random_batch(TARGET, seed), 1e-2).loss.item() for seed in range(2)]
        return losses, weight_hash(engine.state())


@needs_bubblewrap
def test_an_honest_engine_does_not_notice(tmp_path):
    path = tmp_path / "candidate.py"
    path.write_text(write_engine(TARGET, Plan.textbook()))
    assert steps(path, boxed=True) == steps(path, boxed=False)


@needs_bubblewrap
@pytest.mark.slow
def test_ranks_find_each_other_without_a_network(tmp_path):
    path = tmp_path / "candidate.py"
    path.write_text(write_engine(TARGET, Plan.textbook()))
    assert steps(path, boxed=True, ranks=2) == steps(path, boxed=False, ranks=2)


@needs_bubblewrap
@pytest.mark.slow
def test_compiled_regions_work(tmp_path):
    path = toy(tmp_path, step="assert torch.compile(lambda x: x * 2 + 1)(torch.ones(1000)).sum() == 3000")
    steps(path, boxed=True)


@needs_bubblewrap
@pytest.mark.slow
def test_a_second_process_compiles_nothing_again_not_even_headers(tmp_path):
    """The headers lie where no variable of the compiler's says."""
    path, cache = toy(tmp_path, step="torch.compile(lambda x: x * 2 + 1)(torch.ones(1000))"), tmp_path / "cache"
    cache.mkdir()
    box, made = sandbox(path, TARGET, cache=cache), []
    for _ in range(2):
        with EngineProcess(path, TARGET, wrap=box.wrap, limits=box.limits, timeout=300) as engine:
            engine.load(WEIGHTS)
            engine.step(random_batch(TARGET, 0), 0.1)
        made.append({file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.suffix in (".so", ".gch")})
    assert {file.suffix for file in made[0]} == {".so", ".gch"}
    assert made[0] == made[1]


@needs_bubblewrap
@pytest.mark.slow
def test_a_candidate_finds_the_compilers_headers_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_made_beforehand", functools.cache(module._made_beforehand.__wrapped__))
    path, cache = toy(tmp_path, step="torch.compile(lambda x: x * 2 + 1)(torch.ones(1000))"), tmp_path / "cache"
    cache.mkdir()
    fill_cache(cache, path, "cpu")
    assert [entry.name for entry in tmp_path.glob("forgetrain-*")] == [f"forgetrain-headers-{os.getuid()}"]
    given = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.suffix == ".gch"}
    box = sandbox(path, TARGET, cache=cache)
    with EngineProcess(path, TARGET, wrap=box.wrap, limits=box.limits, timeout=300) as engine:
        engine.load(WEIGHTS)
        engine.step(random_batch(TARGET, 0), 0.1)
    assert given == {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.suffix == ".gch"} != {}


@needs_bubblewrap
def test_each_compiler_s_code_stays_in_the_engine_s_folder(tmp_path):
    names = ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR"]
    cache = tmp_path / "cache"
    cache.mkdir()
    path = toy(
        tmp_path,
        step=f"for n in {names}: os.makedirs(os.environ[n], exist_ok=True); open(os.environ[n] + '/' + n, 'w')",
    )
    box = sandbox(path, TARGET, cache=cache)
    with EngineProcess(path, TARGET, wrap=box.wrap, limits=box.limits, folder=box.cache) as engine:
        engine.load(WEIGHTS)
        engine.step(random_batch(TARGET, 0), 0.1)
    assert sorted(file.name for file in cache.rglob("*") if file.is_file()) == sorted(names)


@needs_bubblewrap
def test_a_process_apart_finds_what_was_there_and_nothing_that_came_since(tmp_path):
    look = "assert sorted(os.listdir(os.environ['TORCHINDUCTOR_CACHE_DIR'])) == "
    cache, apart_says = tmp_path / "cache", f"{look}['link', 'pipe', 'region']; open('/tmp/torchinductor_forge/x', 'w')"
    cache.mkdir()
    (cache / "region").touch()
    (cache / "link").symlink_to("/")
    os.mkfifo(cache / "pipe")
    path = toy(tmp_path, step=apart_says)
    box = sandbox(path, TARGET, cache=cache)
    with box.apart() as apart:
        (cache / "since").touch()
        with EngineProcess(path, TARGET, wrap=apart.wrap, limits=apart.limits, folder=apart.cache) as engine:
            engine.load(WEIGHTS)
            engine.step(random_batch(TARGET, 0), 0.1)
    assert sorted(file.name for file in cache.iterdir()) == ["link", "pipe", "region", "since"]
    assert not apart.cache.exists()  # type: ignore[union-attr]


@needs_bubblewrap
def test_where_the_folder_cannot_be_copied_the_process_apart_has_an_empty_one(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "region").touch()
    box = sandbox(toy(tmp_path), TARGET, cache=cache)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with box.apart() as apart:
        assert apart.cache is not None
        assert not any(apart.cache.iterdir())


def test_an_engine_that_compiles_nothing_gets_no_headers(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    fill_cache(cache, toy(tmp_path), "cpu")
    assert not any(cache.iterdir())


@needs_bubblewrap
@pytest.mark.parametrize("there", ["a file", "a link to nowhere", "a link", "anybody's", "made, and gone"])
def test_where_headers_cannot_be_kept_the_candidate_makes_its_own(there, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_made_beforehand", module._made_beforehand.__wrapped__)
    own, cache = tmp_path / f"forgetrain-headers-{os.getuid()}", tmp_path / "cache"
    cache.mkdir()
    if there == "a file":
        own.write_text("")
    elif there.startswith("a link"):
        own.symlink_to(tmp_path / "elsewhere")
        if there == "a link":
            (tmp_path / "elsewhere").mkdir()
    elif there == "anybody's":
        own.mkdir()
        own.chmod(0o777)
    else:
        monkeypatch.setattr(module, "_made_beforehand", lambda: tmp_path / "gone")
    fill_cache(cache, toy(tmp_path, step="torch.compile(lambda x: x)"), "cpu")
    assert not any(cache.iterdir())


#: What bubblewrap puts into a /dev of its own, and places that other mounts cover.
_EVERYWHERE = {"null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "shm", "fd", "core", "console"}


@needs_bubblewrap
def test_the_devices_of_a_gpu_are_put_into_a_closed_dev(tmp_path, monkeypatch):
    nodes = [str(node) for node in sorted(Path("/dev").iterdir()) if node.name not in _EVERYWHERE]
    nodes = [node for node in nodes if not os.path.islink(node) and "std" not in node][:3]
    if not nodes:
        pytest.skip("this machine's /dev holds nothing of its own")
    monkeypatch.setattr(module, "_gpu_nodes", lambda: nodes)
    box = sandbox(toy(tmp_path), TARGET, device="cuda")
    assert box.sandboxed, box.description
    look = "import os; print(*sorted(os.listdir('/dev'))); open('/dev/new', 'w')"
    seen = subprocess.run(box.wrap([sys.executable, "-c", look]), capture_output=True, text=True, check=False)
    assert set(nodes) <= {f"/dev/{name}" for name in seen.stdout.split()}
    assert "Read-only file system" in seen.stderr


#: Python that raises unless something is out of reach: a list of (name, statement that must raise OSError or such).
REACH = """
import glob, os, socket, subprocess, sys
reached = []
def attempt(name, action):
    try:
        action()
    except (OSError, ImportError, subprocess.SubprocessError):
        return
    reached.append(name)
def connect(*address):
    with socket.create_connection(address, timeout=1):
        pass
attempt("network", lambda: connect("1.1.1.1", 53))
attempt("names", lambda: socket.getaddrinfo("example.com", 80))
attempt("repository", lambda: os.listdir({repository!r}))
attempt("test folder", lambda: os.listdir({folder!r}))
attempt("home", lambda: os.listdir({home!r} + "/.cache"))
attempt("password file", lambda: open("/etc/passwd"))
attempt("forgetrain", lambda: __import__("forgetrain"))
attempt("pydantic", lambda: __import__("pydantic"))
attempt("parent", lambda: os.kill({pid}, 0) if {pid} > 50 else open("/nowhere"))
attempt("parent's memory", lambda: open("/proc/{pid}/mem"))
attempt("own file", lambda: open(__file__, "a"))
for folder in ("/", "/usr", "/dev", "/forge", "/site-packages", "/etc"):
    attempt("write " + folder, lambda: open(folder + "/x", "w"))
attempt("disk", lambda: [open("/tmp/%d" % i, "wb").write(bytes(1 << 28)) for i in range(12)])
for path in glob.glob("/tmp/*"): os.path.isfile(path) and os.remove(path)
attempt("shared memory", lambda: [open("/dev/shm/%d" % i, "wb").write(bytes(1 << 28)) for i in range(12)])
for path in glob.glob("/dev/shm/*"): os.remove(path)
attempt("mount", lambda: subprocess.run(["mount", "-t", "tmpfs", "x", "/tmp"], check=True, capture_output=True))
attempt("namespace", lambda: subprocess.run(["unshare", "-Ur", "true"], check=True, capture_output=True))
if len([p for p in os.listdir("/proc") if p.isdigit()]) > 5: reached.append("other processes")
if os.environ.keys() & {{"SECRET", "SSH_AUTH_SOCK", "OPENAI_API_KEY"}}: reached.append("environment")
if open("/proc/self/status").read().split("CapEff:")[1].split()[0] != "0" * 16:
    reached.append("capabilities")
assert not reached, reached
"""


@needs_bubblewrap
def test_nothing_is_within_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    script = REACH.format(
        repository=str(Path(__file__).parents[2]), folder=str(tmp_path), home=str(Path.home()), pid=os.getpid()
    )
    path = toy(tmp_path, build="pass")
    path.write_text(script + path.read_text())
    box = sandbox(path, TARGET)
    with EngineProcess(path, TARGET, wrap=box.wrap, limits=box.limits) as engine:
        engine.load(WEIGHTS)


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("\n        while True: os.fork()", "limit"),
        ("import signal; signal.signal(15, signal.SIG_IGN); time.sleep(1000)", "timeout"),
        ("os.fork() or (os.setsid(), time.sleep(1000)); os._exit(3)", "crashed"),
        ("x = [torch.ones(1 << 28) for _ in range(100)]", "limit"),
    ],
)
def test_what_exhausts_is_ended(tmp_path, step, kind):
    path = toy(tmp_path, step=step)
    box = sandbox(path, TARGET, memory_gib=1)
    with EngineProcess(
        path, TARGET, wrap=box.wrap, limits=box.limits, timeout=5 if kind == "timeout" else 30
    ) as engine:
        engine.load(WEIGHTS)
        with pytest.raises(EngineFailure) as failure:
            engine.step(random_batch(TARGET, 0), 0.1)
    assert failure.value.kind == kind


def test_without_bubblewrap_limits_stay_and_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_working_bubblewrap", lambda device: ((), "bubblewrap is not installed"))
    box = sandbox(toy(tmp_path), TARGET, memory_gib=2)
    assert not box.sandboxed
    assert box.description == "unsandboxed: bubblewrap is not installed"
    assert box.wrap(["python", "x"]) == ["python", "x"]
    assert box.limits["resident"] == 2 << 30


def test_the_reason_is_the_tools_own(monkeypatch):
    module._working_bubblewrap.cache_clear()
    monkeypatch.setattr(module.shutil, "which", lambda name: "/bin/false")
    assert module._working_bubblewrap("cpu") == ((), "bubblewrap does not work here: exit code 1")
    module._working_bubblewrap.cache_clear()
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert "apt install bubblewrap" in module._working_bubblewrap("cpu")[1]
    module._working_bubblewrap.cache_clear()
