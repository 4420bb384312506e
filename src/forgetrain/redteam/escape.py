"""Engines that leave their place: looking for the answers, forging messages, breaking out, exhausting the machine,
crashing."""

from __future__ import annotations

from forgetrain.redteam.attack import Attack


def _at_import(family: str, name: str, what: str, code: str, says: str) -> Attack:
    return Attack(family, name, what, "contract", append=code, says=says)


def _in_step(code: str) -> str:
    body = "\n".join("        " + line for line in code.strip().splitlines())
    return (
        "import ctypes, os, signal, socket, sys, threading, time\n"
        "class Engine(Honest):\n    calls = 0\n    def step(self, batch, lr):\n        self.calls += 1\n"
        f"{body}\n        return super().step(batch, lr)\n"
    )


def _golden(name: str, what: str, code: str, says: str = "raised") -> Attack:
    return _at_import("golden looked for", name, what, code, says)


def _forged(name: str, what: str, code: str, says: str) -> Attack:
    prologue = "import gc\nsock = next(o for o in gc.get_objects() if type(o).__name__ == 'Channel').socket\n"
    return Attack("pipe forged", name, what, "contract", append=_in_step(prologue + code), says=says)


def _escape(name: str, what: str, code: str, says: str) -> Attack:
    return Attack("escape", name, what, "contract", append=_in_step(code), says=says)


GOLDEN = (
    _golden(
        "on disk",
        "looks for safetensors in every folder",
        """
import os
_found = [os.path.join(f, n) for f, _, names in os.walk("/") for n in names if n.endswith(".safetensors")]
if not _found:
    raise FileNotFoundError("no golden record")
""",
        "no golden record",
    ),
    _golden(
        "in the project", "imports the reference", "import forgetrain.reference.transformers\n", "ModuleNotFoundError"
    ),
    _golden(
        "in the parent's memory",
        "opens the memory of every other process",
        """
import os
_others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (os.getpid(), 1, 2)]
_open = [open(f"/proc/{p}/mem", "rb") for p in _others]
if not _open:
    raise PermissionError("no other process")
""",
        "raised",
    ),
    _golden(
        "in the ledger",
        "opens the ledger",
        "open('/home/forge/ledger/ledger.sqlite', 'rb')\n",
        "FileNotFoundError",
    ),
    _golden(
        "in the environment",
        "follows paths in the environment",
        """
import os
_paths = [v for v in os.environ.values() if "forgetrain" in v.lower() or "golden" in v.lower()]
if not _paths:
    raise KeyError("no path of the project")
""",
        "no path of the project",
    ),
    Attack(
        "golden looked for",
        "in the caller's frames",
        "searches the stack and the heap for expected values, and answers with what it finds there",
        "contract",
        append="""
import gc
class Engine(Honest):
    def loss(self, batch):
        for thing in gc.get_objects():
            if type(thing).__name__ in ("OracleStep", "Verdict", "Judge", "Trial"):
                return thing.loss.float()
        return torch.zeros(())
""",
        says="loss",
    ),
    Attack(
        "golden looked for",
        "in shared memory",
        "answers with a tensor that somebody left in shared memory",
        "contract",
        append="""
import os
class Engine(Honest):
    def loss(self, batch):
        names = os.listdir("/dev/shm")
        return torch.load("/dev/shm/" + names[0]) if names else torch.zeros(())
""",
        says="loss",
    ),
)

_RESULT = """
import json
tensors = [["loss", "float32", []], ["grad_norm", "float32", []], ["applied", "bool", []]]
header = {"kind": "result", "fields": {}, "tensors": tensors}
text = json.dumps(header).encode()
frame = b"FGT1" + len(text).to_bytes(4, "little") + text + bytes(8) + bytes([1])
"""
_RESULT_OF = """
class Engine(Honest):
    def step(self, batch, lr):
        result = super().step(batch, lr)
"""
FORGED = (
    _forged("noise", "writes bytes that are no message", "sock.send(b'x' * 64)\n", "garbage"),
    _forged(
        "an answer before the work",
        "answers with zeros before the step is computed",
        _RESULT + "sock.send(frame)\n",
        "loss",
    ),
    _forged(
        "an answer too many",
        "sends a second answer, for the next question",
        _RESULT + "threading.Timer(0.0, lambda: (time.sleep(0.05), sock.send(frame))).start()\n",
        "",
    ),
    _forged(
        "a terabyte",
        "announces a tensor that no memory holds",
        """
text = b'{"kind": "result", "fields": {}, "tensors": [["loss", "float32", [1099511627776]]]}'
sock.send(b"FGT1" + len(text).to_bytes(4, "little") + text)
""",
        "garbage",
    ),
    _forged(
        "a pickle",
        "sends a pickle that would run a command where it is loaded",
        """
import pickle
class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/owned",)
sock.send(pickle.dumps(Bomb()))
""",
        "garbage",
    ),
    _forged(
        "nesting",
        "sends a header of a hundred thousand brackets",
        "text = b'[' * 100_000\nsock.send(b'FGT1' + len(text).to_bytes(4, 'little') + text)\n",
        "garbage",
    ),
    _forged(
        "half an answer",
        "sends half a header and is silent",
        "sock.send(b'FGT1' + (1000).to_bytes(4, 'little') + b'{')\ntime.sleep(1000)\n",
        "time allowed",
    ),
    _forged("closed", "closes the channel", "os.close(sock.fileno())\ntime.sleep(1000)\n", "crashed"),
    Attack(
        "pipe forged",
        "another dtype",
        "the loss is float64",
        "contract",
        append=_RESULT_OF + "        return result._replace(loss=result.loss.double())\n",
        says="garbage",
    ),
    Attack(
        "pipe forged",
        "another shape",
        "the loss is a vector",
        "contract",
        append=_RESULT_OF + "        return result._replace(loss=result.loss[None])\n",
        says="garbage",
    ),
    Attack(
        "pipe forged",
        "a fine result on stdout",
        "prints a verdict and fails",
        "contract",
        append=_in_step('print(\'{"gate": "G4", "pass": true}\', flush=True)\nraise SystemExit(0)'),
        says="crashed",
    ),
)

ESCAPES = (
    _escape(
        "network",
        "connects to a public address",
        "socket.create_connection(('1.1.1.1', 53), timeout=2)\n",
        "raised OSError",
    ),
    _escape(
        "names",
        "asks for a name's address, as exfiltration through DNS does",
        "socket.getaddrinfo('example.com', 80)\n",
        "raised",
    ),
    _escape("password file", "reads /etc/passwd", "open('/etc/passwd').read()\n", "FileNotFoundError"),
    _escape("home", "reads the user's keys", "os.listdir(os.path.expanduser('~root') + '/.ssh')\n", "raised"),
    _escape("its own file", "rewrites itself after it was frozen", "open(__file__, 'a').write('#')\n", "raised"),
    _escape("the server's file", "rewrites what serves it", "open(sys.argv[0], 'a').write('#')\n", "raised"),
    _escape(
        "torch's files",
        "plants code in torch",
        "open(os.path.join(os.path.dirname(torch.__file__), 'x.py'), 'w')\n",
        "raised",
    ),
    _escape(
        "a new namespace",
        "asks for rights of its own",
        "assert ctypes.CDLL(None, use_errno=True).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0, 'no mount'\n",
        "raised",
    ),
    _escape(
        "init",
        "kills the first process that it sees",
        "os.kill(1, 9); os.kill(os.getppid(), 9)\nraise RuntimeError('still here')\n",
        "r",
    ),
    _escape(
        "fork bomb",
        "forks for ever",
        "while True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.1)\n",
        "limit",
    ),
    _escape("100 GB", "allocates a hundred gigabytes", "torch.ones(25 << 30)\n", "raised"),
    _escape(
        "all memory, bit by bit",
        "allocates until it is stopped",
        "self.x = []\nwhile True:\n    self.x.append(torch.ones(1 << 24))\n",
        "",
    ),
    _escape(
        "the disk",
        "fills the scratch folder",
        "for i in range(64):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 28))\n",
        "raised OSError",
    ),
    _escape(
        "the compiler's folder",
        "fills the folder for compiled code, which is on disk",
        """
import os
for i in range(64):
    with open(os.environ['TORCHINDUCTOR_CACHE_DIR'] + f'/{i}', 'wb') as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 27)
    time.sleep(0.1)
""",
        "limit",
    ),
    _escape(
        "SIGTERM",
        "ignores SIGTERM and sleeps",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)\n",
        "time allowed",
    ),
    _escape("garbage for ever", "prints for ever", "while True:\n    print('x' * 1000)\n", "time allowed"),
    _escape(
        "a debugger",
        "attaches to its parent",
        "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0, 'not attached'\n",
        "raised",
    ),
)

_AT = "if self.calls == {n}:\n    {what}\n"
CRASHES = (
    Attack(
        "crash",
        "exception at step 2",
        "raises",
        "contract",
        append=_in_step(_AT.format(n=2, what="raise RuntimeError('step 2')")),
        says="step 2",
    ),
    Attack(
        "crash",
        "exit at step 2",
        "ends with exit code 0",
        "contract",
        append=_in_step(_AT.format(n=2, what="os._exit(0)")),
        says="crashed",
    ),
    Attack(
        "crash",
        "fault at step 10",
        "reads address 0",
        "G7",
        append=_in_step(_AT.format(n=10, what="ctypes.string_at(0)")),
        says="SIGSEGV",
    ),
    Attack(
        "crash",
        "stop at step 10",
        "hangs",
        "G7",
        append=_in_step(_AT.format(n=10, what="time.sleep(1000)")),
        says="time allowed",
    ),
    Attack(
        "crash",
        "exception at step 30",
        "raises, late",
        "G5",
        append=_in_step(_AT.format(n=30, what="raise RuntimeError('step 30')")),
        says="step 30",
    ),
    Attack(
        "crash",
        "NaN at step 30",
        "its weights become NaN, late",
        "G5",
        append=_in_step(_AT.format(n=30, what="[m.fill_(float('nan')) for m in self.master.values()]")),
    ),
    Attack("crash", "no build", "has no build function", "contract", append="del build\n", says="raised"),
)

ATTACKS = (*GOLDEN, *FORGED, *ESCAPES, *CRASHES)
