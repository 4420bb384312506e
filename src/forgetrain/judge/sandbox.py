"""The sandbox in which a candidate runs: bubblewrap where it works, resource limits alone where it does not.

    box = sandbox(engine_file, target)
    with EngineProcess(engine_file, target, wrap=box.wrap, limits=box.limits) as candidate: ...
    box.sandboxed, box.description          # True, "bubblewrap 0.8.0: own user, process, network ... namespaces"

Inside there is no network, no home, no repository and no environment of this project's: the interpreter and /usr are
bound read-only, torch's own packages one by one under /site-packages, the three files that serve an engine and the
candidate under /forge. Only /tmp and /dev/shm can be written, both in memory and of bounded size, and a folder for what
torch.compile and triton make, when one is given: a candidate's processes share it, so that only the first compiles.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import forgetrain
from forgetrain.engine.launch import SERVE, strangers_environment
from forgetrain.errors import UserError
from forgetrain.judge.scratch import Scratch, folder_in, keep_newest, remove
from forgetrain.numerics.runtime import runtime
from forgetrain.spec.moments import state_shapes
from forgetrain.spec.target import Target

SCRATCH = 2 << 30  # bytes in /tmp, and as many in /dev/shm and of compiled code: regions take some hundred MiB
PROCESSES = 256  # torch.compile starts a worker a core, and each of them a compiler
#: Where several users' processes are counted together this is no lower than what a busy desktop has.
_OF_A_USER = 16 * PROCESSES
_ADDRESSES = 16 << 30  # address space that is mapped but not resident: libraries, stacks, allocators' arenas
_INSIDE = Path("/forge")
_SITE = Path("/site-packages")  # by that name libraries tell what is installed from what is a user's
#: Where torch's compiler would keep what it makes for the user "forge": its precompiled headers, which take ten
#: seconds, go nowhere else, whatever its environment says.
_CACHE = Path("/tmp/torchinductor_forge")
#: Who keeps compiled code, and in what folder of that: without one FlashAttention-4 and quack compile in every process.
_COMPILERS = {
    "TORCHINDUCTOR_CACHE_DIR": "",
    "TRITON_CACHE_DIR": "triton",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash",
    "QUACK_CACHE_DIR": "quack",
}
#: What of /etc programs need: the dynamic linker's cache, and names of compilers.
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")
#: Bits depend on what torch reads here: cores, caches and memory nodes.
_SYS_CPU = ("/sys/devices/system/cpu", "/sys/devices/system/node")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_HEADERS_KEPT = 3  # environments
_REGION = "import torch\ntorch.compile(lambda x: x.exp() + 1, dynamic=False)(torch.ones(4096))"
#: What a GPU's engine may be written for besides torch, and where of it Python must look; bound if it is installed.
_GPU_PACKAGES, _GPU_PATHS = ("flash-attn-4", "quack-kernels"), (_SITE / "nvidia_cutlass_dsl" / "dsl_packages",)
_SYS_GPU = ("/sys/bus/pci", "/sys/class", "/sys/devices", "/sys/module/nvidia")


@dataclass(frozen=True)
class Sandbox:
    """``limits`` are EngineProcess's; ``command`` is what comes before the child's own command line."""

    sandboxed: bool
    description: str
    limits: dict[str, int]
    command: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    cache: Path | None = None

    def wrap(self, argv: list[str]) -> list[str]:
        """The child's command line inside the sandbox, where its files have other names."""
        names = dict(self.renamed)
        return [*self.command, *(names.get(argument, argument) for argument in argv)]

    def with_cache(self, cache: Path | None) -> Sandbox:
        """The same with another folder for compiled code, where there are such folders."""
        if self.cache is None or cache is None:
            return self
        old, new = str(self.cache.resolve()), str(cache.resolve())
        return replace(self, cache=cache, command=tuple(new if part == old else part for part in self.command))

    @contextlib.contextmanager
    def apart(self) -> Iterator[Sandbox]:
        """The same with a copy of the folder for compiled code as it is now: what a process of this sandbox leaves
        there from now on, one of the other does not find, and neither compiles what had been compiled."""
        if self.cache is None:
            yield self
            return
        with folder_in(self.cache.parent) as copy:
            # a stranger's pipes and holes are kept as such, links as links
            command = ["cp", "-a", "--reflink=auto", f"{self.cache}/.", str(copy)]
            if subprocess.run(command, capture_output=True, check=False).returncode != 0:
                remove(copy)  # a header that was copied in part would be taken for a whole one
                copy.mkdir(exist_ok=True)
            yield self.with_cache(copy)


def sandbox(
    engine: Path,
    target: Target,
    *,
    device: str | None = None,
    memory_gib: float | None = None,
    cache: Path | None = None,
) -> Sandbox:
    """A sandbox for this engine file.

    Args:
        device: the target's unless given; ``cuda`` binds the GPU's device nodes.
        memory_gib: host memory of the whole process tree; the target's, else three quarters of this machine's.
        cache: a folder of this candidate's alone, for compiled code; without bubblewrap compilers use their own.
    """
    device = device or target.hardware.device
    memory = _memory(target, device, memory_gib)
    limits = _limits(memory, device, SCRATCH)
    program, reason = _working_bubblewrap(device)
    if not program:
        return Sandbox(False, f"unsandboxed: {reason}", limits, (), ())
    limits["NPROC"] = _OF_A_USER
    engine = engine.resolve()
    files = {SERVE.with_name(name): name for name in ("serve.py", "supervise.py", "protocol.py")} | {
        engine: "engine.py"
    }
    if cache is not None:
        limits["written"] = SCRATCH
    binds = [] if cache is None else _cache_arguments(cache)
    binds += [part for file, name in files.items() for part in ("--ro-bind", str(file), str(_INSIDE / name))]
    renamed = {str(file): str(_INSIDE / name) for file, name in files.items()}
    renamed[sys.executable] = _interpreter()
    return Sandbox(
        True,
        f"{_version()}: no network, own processes, /tmp and /dev/shm of {SCRATCH >> 30} GiB, nothing else writable",
        limits,
        (*program, *binds, "--remount-ro", "/", "--"),
        tuple(renamed.items()),
        cache,
    )


def training_sandbox(
    engine: Path, target: Target, target_file: Path, data: Path, folder: Path, cache: Path | None = None
) -> Sandbox:
    """A sandbox for ``forgetrain train`` with this engine file: this project with what it needs, the target's file and
    the built data are read-only, and ``folder``, in which runs are kept, can be written, as can ``cache``, as above.

    The command line names python, target.toml, engine.py and runs; ``wrap`` puts in what each is called.
    """
    device = target.hardware.device
    limits = _limits(_memory(target, device, None), device, SCRATCH + state_bytes(target))
    given = folder / target.name / "data"
    program, reason = _working_bubblewrap(device, "forgetrain.train.loop")
    if not program:
        given.symlink_to(data.resolve())
        renamed = {"python": sys.executable, "target.toml": str(target_file), "engine.py": str(engine)}
        return Sandbox(False, f"unsandboxed: {reason}", limits, (), (*renamed.items(), ("runs", str(folder))))
    limits["NPROC"] = _OF_A_USER
    given.mkdir()
    hosts = folder / "hosts"  # torchrun's processes find each other by name
    hosts.write_text("127.0.0.1 localhost forge\n", encoding="utf-8")
    renamed = {"python": _interpreter(), "runs": "/runs"}
    renamed |= {name: str(_INSIDE / name) for name in ("target.toml", "engine.py")}
    binds = [] if cache is None else _cache_arguments(cache)
    if cache is not None:
        limits["written"] = SCRATCH
    binds += ["--bind", str(folder.resolve()), "/runs"]
    for file, inside in (
        (data.resolve(), f"/runs/{target.name}/data"),
        (target_file.resolve(), renamed["target.toml"]),
        (engine.resolve(), renamed["engine.py"]),
        (hosts.resolve(), "/etc/hosts"),
    ):
        binds += ["--ro-bind", str(file), inside]
    command = (*program, *binds, "--remount-ro", "/", "--")
    words = f"{_version()}: no network, nothing but its run is writable"
    return Sandbox(True, words, limits, command, (*renamed.items(),), cache)


def fill_cache(cache: Path, engine: Path, device: str) -> None:
    """Puts into a candidate's new folder for compiled code what torch's compiler makes before it looks at any code,
    above all its headers, precompiled. That is the same for every candidate and takes ten seconds of a core, so it is
    made once on a machine, in a sandbox but by no candidate, and each gets a copy. The folder stays empty, and the
    candidate waits, for an engine that compiles nothing, on a GPU, and where there is no sandbox, compiler or room."""
    if device != "cpu" or b"torch.compile" not in engine.read_bytes():
        return
    try:
        made = _made_beforehand()
        if made is not None:
            shutil.copytree(made, cache, dirs_exist_ok=True)
    except OSError:
        shutil.rmtree(cache, ignore_errors=True)  # a header that was copied in part would be taken for a whole one
        cache.mkdir(exist_ok=True)


@functools.cache
def _made_beforehand() -> Path | None:
    """The folder that ``fill_cache`` copies, made where it is missing; None where that cannot be. It lies in the
    system's temporary folder, as torch's own does, in one that is this user's alone. Raises OSError."""
    program, _ = _working_bubblewrap("cpu")
    compiler = shutil.which("g++")
    if not program or compiler is None:
        return None
    own = Path(tempfile.gettempdir()) / f"forgetrain-headers-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    folder = own / hashlib.sha256(repr((torch.__version__, version, program)).encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    scratch = Scratch("compiler")
    try:
        making = scratch.path / "made"
        making.mkdir()
        command = [*program, *_cache_arguments(making), "--remount-ro", "/", "--", _interpreter(), "-P", "-c", _REGION]
        subprocess.run(command, capture_output=True, env=strangers_environment("cpu"), check=True, timeout=300)
        keep_newest(own, _HEADERS_KEPT - 1)  # the others are of another torch or compiler
        making.rename(folder)
    except (subprocess.SubprocessError, OSError):
        pass  # another process may have been quicker: its folder serves as well
    finally:
        scratch.close()
    return folder if folder.is_dir() else None


def state_bytes(target: Target) -> int:
    """What a checkpoint holds: the masters and moments in fp32."""
    return sum(4 * math.prod(shape) for shape in state_shapes(target).values())


def _limits(memory: int, device: str, file: int) -> dict[str, int]:
    """Those that hold with bubblewrap and without; ``file``: bytes of the largest."""
    limits = {"FSIZE": file, "NOFILE": 4096, "processes": PROCESSES, "resident": memory}
    if device == "cpu":  # CUDA reserves hundreds of GiB of addresses
        limits["AS"] = memory + _ADDRESSES
    return limits


def _memory(target: Target, device: str, memory_gib: float | None) -> int:
    """Bytes of host memory for a process tree."""
    budget = memory_gib or (target.hardware.memory_gib if device == "cpu" else None)
    return int(budget * 2**30) if budget else _total_memory() * 3 // 4


def _cache_arguments(cache: Path) -> list[str]:
    arguments = ["--bind", str(cache.resolve()), str(_CACHE)]
    for name, folder in _COMPILERS.items():
        arguments += ["--setenv", name, str(_CACHE / folder)]
    return [*arguments, "--setenv", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1"]


@functools.cache
def _working_bubblewrap(device: str, module: str = "torch") -> tuple[tuple[str, ...], str]:
    """The command without a candidate's files, the strictest that runs here; or () and the reason. ``module``: what
    can be imported inside, torch alone or something of this project."""
    if sys.platform != "linux":
        return (), "bubblewrap needs Linux"
    found = shutil.which("bwrap")
    if found is None:
        return (), "bubblewrap is not installed (on Debian and Ubuntu: apt install bubblewrap)"
    common, problem = _arguments(device, project=module != "torch"), ""
    # disabling user namespaces inside fails where /proc/sys is read-only, as in some containers
    for user in (("--unshare-user", "--disable-userns"), ("--unshare-user",), ()):
        command = (found, *user, *common)
        done = subprocess.run(
            [*command, "--", _interpreter(), "-c", f"import {module}"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return command, ""
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return (), f"bubblewrap does not work here: {problem}"


def _gpu_nodes() -> list[str]:
    return sorted(str(node) for node in Path("/dev").glob("nvidia*"))


def _arguments(device: str, project: bool) -> tuple[str, ...]:
    arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "forge"]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--size", str(SCRATCH), "--tmpfs", "/dev/shm"]
    for node in _gpu_nodes() if device == "cuda" else ():
        arguments += ["--dev-bind", node, node]  # before /dev is closed: what is bound needs a place there
    arguments += ["--remount-ro", "/dev"]
    arguments += ["--size", str(SCRATCH), "--tmpfs", "/tmp"]
    for top in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(top):
            arguments += ["--symlink", os.readlink(top), top]
        elif os.path.isdir(top):
            arguments += ["--ro-bind", top, top]
    base = os.path.realpath(sys.base_prefix)
    if not Path(base).is_relative_to("/usr"):
        arguments += ["--ro-bind", base, base]
    for folder in _hidden(base):
        arguments += ["--tmpfs", folder, "--remount-ro", folder]
    for name in _ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for folder in _SYS_CPU if device == "cpu" else (*_SYS_CPU, *_SYS_GPU):
        arguments += ["--ro-bind-try", folder, folder]
    gpu = device == "cuda"
    for package in packages("torch", "numpy", *(_GPU_PACKAGES if gpu else ()), *(project_needs() if project else ())):
        arguments += ["--ro-bind", str(package), str(_SITE / package.name)]
    if project:
        own = Path(forgetrain.__file__).parent
        arguments += ["--ro-bind", str(own), str(_SITE / own.name)]
    environment = {
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "USER": "forge",  # torch.compile names its cache after the user, who has no entry in a password file here
        "PATH": "/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": ":".join(map(str, (_SITE, *(_GPU_PATHS if gpu else ())))),
        **runtime(),
    }
    for name, value in environment.items():
        arguments += ["--setenv", name, value]
    return (*arguments, "--chdir", "/tmp")


def project_needs() -> list[str]:
    """Distributions that this project's core needs; extras, which hold the references, are left out.

    Raises UserError when this runs from a folder of sources that was never installed."""
    try:
        requires = importlib.metadata.distribution("forgetrain").requires or ()
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "forgetrain is not installed here, and G9 needs to know what it needs",
            file=Path(forgetrain.__file__).parent,
            remedy="pip install --no-deps -e . in its folder",
        ) from None
    return [_NAME.match(requirement).group() for requirement in requires if "extra" not in requirement]  # type: ignore[union-attr]


def packages(*names: str) -> list[Path]:
    """The files and folders that make up these distributions and what they need, as installed.

    Raises UserError when one was installed in a way that leaves no list of its files.
    """
    found: dict[str, list[Path]] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement on another platform
        if not distribution.files:
            raise UserError(f"cannot tell which files {name} consists of", remedy=f"reinstall {name} with pip")
        tops = {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}
        found[name] = sorted(Path(str(distribution.locate_file(top))).resolve() for top in tops)
        for requirement in distribution.requires or ():
            text, _, marker = requirement.partition(";")
            match = _NAME.match(text)
            if match and "extra" not in marker:
                waiting.append(match.group())
    return sorted({path for paths in found.values() for path in paths if path.exists()})


def _hidden(base: str) -> list[str]:
    """What a candidate must not see within the folders that are bound whole: other packages, and this project when
    it happens to live there."""
    bound = [Path("/usr"), Path(base)]
    folders = [Path(forgetrain.__file__).parent, Path.cwd()]
    for root in dict.fromkeys((base, "/usr", "/usr/local", sys.prefix)):
        for kind in ("site-packages", "dist-packages"):
            folders += Path(root).glob(f"lib*/python3*/{kind}")
    real = dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir())
    inside = [folder for folder in real if any(folder != root and folder.is_relative_to(root) for root in bound)]
    return [str(folder) for folder in inside if not any(root.is_relative_to(folder) for root in bound)]


def _interpreter() -> str:
    """The interpreter that a virtual environment was made from: the environment itself stays outside."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def _version() -> str:
    done = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "bubblewrap"


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
