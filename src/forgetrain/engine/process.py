"""An engine in a process of its own, seen through the engine contract.

    with EngineProcess("runs/nano-cpu/engine/engine.py", target) as engine:
        engine.load(weights)
        result = engine.step(batch, lr=1e-3)

The child only ever emits tensors, and every one is checked against the shape and dtype that it must have before its
memory is allocated. With ``ranks`` > 1 there is one process a rank, each gets its rows of the global batch, and
shards of state are put together here.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetrain import memory
from forgetrain.engine import admit, tree
from forgetrain.engine.contract import Batch, Shard, StepResult, weight_hash
from forgetrain.engine.launch import launch
from forgetrain.engine.printed import Tail
from forgetrain.engine.protocol import Channel, Closed, Message, ProtocolError, Spec, shape_of
from forgetrain.errors import UserError
from forgetrain.numerics.compare import bits
from forgetrain.spec.moments import state_shapes
from forgetrain.spec.taps import tap_names
from forgetrain.spec.target import Target

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq", "step")
_TOLD = 8000  # characters that are kept of an exception's text, which a stranger wrote
#: What a stopped tree may use of a processor, in seconds and as a share of its pauses: time is counted in hundredths.
_AWAKE = (0.05, 0.05)
_LATE = 1.0  # seconds in which a rank's death may come to be known after what it made another rank raise
_WATCH = 0.25  # seconds between looks at a limited process tree: each look reads /proc, about 3 ms


class EngineFailure(Exception):
    """The engine's process did not do what the contract says.

    ``kind``: ``raised`` (an exception in the engine), ``crashed`` (the process ended), ``timeout``, ``garbage`` (not
    the protocol, or a wrong name, shape or dtype), ``disagree`` (ranks that must be equal are not), ``limit`` (too
    many processes, too much memory, or work while it was stopped). ``detail``: the traceback of what was raised, else
    empty.
    """

    def __init__(self, kind: str, message: str, detail: str = ""):
        self.kind, self.detail = kind, detail
        super().__init__(message)


class EngineProcess:
    """Starts the process, builds the engine, and meets the engine contract until ``close()``.

    Args:
        module: the path of a flat engine file (ends in .py), run with a minimal environment; or the dotted name of an
            importable module with ``build``, run in this environment.
        precision, device: the target's unless given. threads: of each rank; the hardware's
            ``threads_of`` so many unless given.
        ranks: processes; collectives over nccl where each has a GPU of its own, else over gloo.
        wrap: puts a sandbox's command around the child's command line.
        deterministic: whether torch is asked for deterministic algorithms only.
        guard: whether the child looks, after every request, whether the engine changed what it was given.
        limits: resource limits by name without RLIMIT_ (supervise.py sets them), and ``processes`` and ``resident``
            (bytes) of the whole tree and ``written`` (bytes in ``folder``), which a thread here watches.
        folder: on this machine's disk, where the engine may write.
        origin: where processes are forked from one that has imported what they need, which one of several; engines of
            different origins do not even have a hash seed or the places of libraries in memory in common.
        timeout: seconds until an answer has come whole; build_timeout: the same for import and build.

    Raises:
        EngineFailure: from every method; the process is dead then.
    """

    def __init__(
        self,
        module: str | Path,
        target: Target,
        *,
        precision: str | None = None,
        device: str | None = None,
        ranks: int = 1,
        threads: int | None = None,
        wrap: Callable[[list[str]], list[str]] | None = None,
        deterministic: bool = True,
        guard: bool = False,
        limits: Mapping[str, int] | None = None,
        folder: Path | None = None,
        origin: int = 0,
        timeout: float = 300.0,
        build_timeout: float = 600.0,
    ):
        self.target, self.ranks, self.timeout = target, ranks, timeout
        self.precision = precision or target.precision.dtype
        self.device = device or target.hardware.device
        self._shapes = target.model.parameter_shapes()
        self._failure: EngineFailure | None = None
        self._paused = time.monotonic(), 0.0
        self._stopped = self._stolen = 0.0  # seconds of all pauses, and of a processor within them
        self._killing = threading.Lock()
        flat = str(module).endswith(".py")
        if flat and not Path(module).is_file():
            raise UserError("no such engine file", file=module, remedy="forgetrain align writes one")
        target.parallel.require_fit(
            ranks, f"the engine's ranks, which are {ranks}", "set it to 1, or start a multiple of it"
        )
        limits = dict(limits or {})
        watched = {name: limits.pop(name) for name in ("processes", "resident", "written") if name in limits}
        pairs = [socket.socketpair() for _ in range(ranks)]
        if self.device == "cuda":
            memory.keep()
        self._channels = [Channel(ours, memory.empty) for ours, _ in pairs]
        numbers = [theirs.fileno() for _, theirs in pairs]
        try:
            self._process = launch(module, numbers, limits, self.device, wrap, origin)
        except OSError:
            for channel in self._channels:
                channel.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        self._printed = Tail(self._process.stdout), Tail(self._process.stderr)
        self._closing = threading.Event()
        if watched:
            threading.Thread(target=self._watch, args=(watched, folder), daemon=True).start()
        try:
            self._build(threads or target.hardware.threads_of(ranks), deterministic, guard, build_timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The contract

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._ask("load", {}, [list(weights.items())] * self.ranks, admit.nothing)

    def step(self, batch: Any, lr: float) -> StepResult:
        """One step on the global batch; ranks must return equal results, bit for bit."""
        answers = self._ask("step", {"lr": float(lr)}, self._split(batch), admit.items("loss", "grad_norm", "applied"))
        results = [dict(answer.tensors) for answer in answers]
        for name in admit.ITEMS:
            if not all(_same(results[0][name], result[name]) for result in results[1:]):
                raise self._fail("disagree", f"ranks return different values of {name}")
        return StepResult(**results[0])

    def loss(self, batch: Any) -> Tensor:
        """Mean loss over the global batch's mask, float32 []."""
        parts = self._split(batch)
        answers = self._ask("loss", {}, parts, admit.items("loss"))
        if self.ranks == 1:
            return answers[0].tensors[0][1]
        losses = torch.stack([answer.tensors[0][1].double() for answer in answers])
        weights = torch.stack([dict(part)["mask"].double().sum().cpu() for part in parts])
        return (torch.where(weights > 0, losses * weights, 0.0).sum() / weights.sum()).float()

    def state(self, kinds: Sequence[str] = STATE_KINDS) -> dict[str, Shard]:
        """The state as full tensors; shards must cover it exactly, and replicas must be equal bit for bit. ``kinds``:
        what of it is wanted."""
        without = [kind for kind in STATE_KINDS if kind not in kinds]
        answers = self._ask("state", {"without": without}, [[]] * self.ranks, self._admit_state)
        merged: dict[str, Shard] = {}
        for name, shape in self._state_shapes(kinds).items():
            pieces = []
            for answer in answers:
                tensors = dict(answer.tensors)
                offsets = {place[0]: place[2] for place in answer.fields["shards"]}
                if name in tensors:
                    pieces.append((tensors[name], tuple(offsets[name])))
            merged[name] = Shard(self._merge(name, shape, pieces), shape, (0,) * len(shape))
        if "step" in merged and not 0 <= int(merged["step"].tensor) < 2**40:
            raise self._fail("garbage", f"the state's step is {int(merged['step'].tensor)}")
        return merged

    def weight_hash(self) -> str:
        """Of the masters, without the moments' way through host memory."""
        return weight_hash(self.state(("master",)))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes a state of full tensors (Shards or plain tensors), as ``state()`` returns it."""
        tensors = [(name, getattr(shard, "tensor", shard)) for name, shard in state.items()]
        self._ask("restore", {}, [tensors] * self.ranks, admit.nothing)

    def probe(self, batch: Any) -> Iterator[tuple[str, Tensor]]:
        """(tap, tensor) as they come; with several ranks the first rank's. Order and shapes are the gates' business,
        number and size are bounded here."""
        r = self.target.recipe
        names = 2 * len(tap_names(self.target.model, max(1, -(-batch.tokens.shape[0] // r.micro_batch_size))))
        largest = max(
            batch.tokens.numel() * max(self._widths()), *(torch.Size(s).numel() for s in self._shapes.values())
        )
        deadline = time.monotonic() + self.timeout
        self._send("probe", {}, self._split(batch), deadline)
        counts = dict.fromkeys(range(self.ranks), 0)
        wanted = True
        while counts:
            rank = self._next(counts, deadline)
            answer = self._receive(rank, deadline, admit.tap(largest * 8))
            counts[rank] += 1
            if answer.kind == "done":
                del counts[rank]
            elif counts[rank] > names:
                raise self._fail("garbage", f"probe yields more than {names} taps")
            elif rank == 0 and wanted:
                asked = time.monotonic()
                try:
                    yield admit.printable(answer.tensors[0][0]), answer.tensors[0][1]
                except GeneratorExit:
                    wanted = False  # the rest is still read, so that the next answer is the next request's
                deadline += time.monotonic() - asked

    def profile(self, batch: Any, lr: float) -> list[tuple[str, str, float, int]]:
        """One step under torch's profiler: (functions, operator, seconds, calls) as serve.py tells them, the first
        rank's. The engine says this of itself: good for a hint, not for a verdict."""
        answers = self._ask("profile", {"lr": float(lr)}, self._split(batch), admit.profile)
        rows = answers[0].fields["rows"]
        return [(admit.printable(row[0]), admit.printable(row[1]), row[2], row[3]) for row in rows]

    def close(self) -> None:
        """Ends the process and everything that it started."""
        self._closing.set()
        self._kill()
        for channel in self._channels:
            channel.close()
        for tail in self._printed:
            tail.close()

    # What a judge needs besides

    def pause(self) -> None:
        """Stops every process of the engine, so that it cannot work while another one is on the clock."""
        tree.send_signal(self._process.pid, signal.SIGSTOP)
        self._paused = time.monotonic(), self.usage().cpu_seconds

    def resume(self) -> None:
        """Raises EngineFailure for one that has worked while it was stopped: a timer of its own can wake it."""
        began, used = self._paused
        self._stopped += time.monotonic() - began
        self._stolen += self.usage().cpu_seconds - used
        if self._stolen > _AWAKE[0] + _AWAKE[1] * self._stopped:
            text = f"the engine used {self._stolen:.2f} s of a processor while it was stopped for {self._stopped:.2f} s"
            raise self._fail("limit", text)
        tree.send_signal(self._process.pid, signal.SIGCONT)

    def usage(self) -> tree.Usage:
        return tree.usage(self._process.pid)

    def peak_memory(self) -> int:
        """Bytes: on a CPU the highest resident size of the tree as the kernel counted it, on a GPU what torch in the
        child says that its allocator held at most, over ranks."""
        if self.device == "cpu":
            return tree.peak_memory(self._process.pid)
        answers = self._ask("memory", {}, [[]] * self.ranks, admit.memory)
        return sum(answer.fields["device_peak_bytes"] for answer in answers)

    @property
    def failure(self) -> EngineFailure | None:
        """What the process died of, or None while it lives."""
        return self._failure

    def printed(self) -> tuple[str, str]:
        """The ends of the child's stdout and stderr."""
        out, err = self._printed
        return out.text(), err.text()

    # Talking to the child

    def _build(self, threads: int, deterministic: bool, guard: bool, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._answers(deadline, admit.ready)
        fields = {
            "target": self.target.plain(),
            "device": self.device,
            "precision": self.precision,
            "threads": threads,
            "deterministic": deterministic,
            "guard": guard,
            "timeout": timeout,
        }
        self._send("build", fields, [[]] * self.ranks, deadline)
        answers = self._answers(deadline, admit.nothing)
        #: Whether the engine says that it repeats itself bit for bit, as every engine does that does not say otherwise.
        self.deterministic = all(answer.fields.get("deterministic", True) for answer in answers)

    def _ask(self, kind: str, fields: dict, tensors: list[list[tuple[str, Tensor]]], check: Callable) -> list[Message]:
        deadline = time.monotonic() + self.timeout
        self._send(kind, fields, tensors, deadline)
        return self._answers(deadline, check)

    def _send(self, kind: str, fields: dict, tensors: list[list[tuple[str, Tensor]]], deadline: float) -> None:
        if self._failure is not None:
            raise self._failure
        for channel, items in zip(self._channels, tensors, strict=True):
            if channel.pending():
                raise self._fail("garbage", f"the engine speaks without being asked, before {kind}{self._last_line()}")
            try:
                channel.send(kind, fields, items, deadline)
            except Closed:
                raise self._fail(*self._obituary()) from None
            except TimeoutError:
                raise self._fail("timeout", f"the engine did not take its input for {kind} in time") from None

    def _answers(self, deadline: float, check: Callable) -> list[Message]:
        """One answer from each rank."""
        waiting = set(range(self.ranks))
        answers: dict[int, Message] = {}
        while waiting:
            rank = self._next(waiting, deadline)
            answers[rank] = self._receive(rank, deadline, check)
            waiting.remove(rank)
        return [answers[rank] for rank in range(self.ranks)]

    def _next(self, waiting: Collection[int], deadline: float) -> int:
        """A rank that has something to say, or is dead: when one rank dies, the others wait for it for ever."""
        poll = select.poll()
        numbers = {self._channels[rank].socket.fileno(): rank for rank in waiting}
        for number in numbers:
            poll.register(number, select.POLLIN)
        while True:
            ready = poll.poll(min(1.0, max(0.0, deadline - time.monotonic())) * 1000)
            if ready:
                return numbers[ready[0][0]]
            if self._failure is not None:
                raise self._failure
            if self._exit_status(0) is not None:
                raise self._fail(*self._obituary())
            if time.monotonic() >= deadline:
                raise self._fail("timeout", f"no answer within the time allowed{self._last_line()}")

    def _receive(self, rank: int, deadline: float, check: Callable) -> Message:
        def check_or_error(kind: str, fields: dict[str, Any], specs: list[Spec]) -> None:
            if kind == "error" and isinstance(fields.get("text"), str) and not specs:
                raise _Raised(admit.printable(fields["text"][-_TOLD:]))
            check(kind, fields, specs)

        try:
            return self._channels[rank].receive(deadline, check_or_error)
        except _Raised as error:
            detail = str(error).strip()
            # what it raised, it may have raised over another rank's death
            if self.ranks > 1 and self._exit_status(_LATE) is not None:
                raise self._fail(*self._obituary()) from None
            raise self._fail("raised", f"the engine raised {detail.rpartition(chr(10))[2][:400]}", detail) from None
        except ProtocolError as error:
            raise self._fail("garbage", f"{admit.printable(str(error))}{self._last_line()}") from None
        except Closed:
            raise self._fail(*self._obituary()) from None
        except TimeoutError:
            raise self._fail("timeout", f"no whole answer within the time allowed{self._last_line()}") from None

    # What arrives must be

    def _state_shapes(self, kinds: Sequence[str] = STATE_KINDS) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in state_shapes(self.target).items() if name.split("/")[0] in kinds}

    def _admit_state(self, kind: str, fields: dict[str, Any], specs: list[Spec]) -> None:
        expected = self._state_shapes()
        places = fields.get("shards")
        if kind != "state" or not isinstance(places, list) or len(places) != len(specs):
            raise ProtocolError("expected a state with one place for each tensor")
        if len({spec.name for spec in specs}) != len(specs):
            raise ProtocolError("the state names a tensor twice")
        for spec, place in zip(specs, places, strict=True):
            if spec.name not in expected:
                raise ProtocolError(f"the state has {spec.name!r:.200}, which the contract does not know")
            if not (isinstance(place, list) and len(place) == 3 and place[0] == spec.name):
                raise ProtocolError(f"{spec.name} has no place")
            shape, offsets = shape_of(place[1]), shape_of(place[2])
            if shape != expected[spec.name] or spec.dtype != (torch.int64 if spec.name == "step" else torch.float32):
                raise ProtocolError(f"{spec.name} is {spec.dtype} {list(shape)}, not of the target's shape and type")
            fits = len(offsets) == len(spec.shape) == len(shape)
            if not fits or any(o + n > g for o, n, g in zip(offsets, spec.shape, shape, strict=True)):
                raise ProtocolError(f"{spec.name} {list(spec.shape)} at {list(offsets)} is not within {list(shape)}")

    def _merge(self, name: str, shape: tuple[int, ...], pieces: list[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
        if pieces and all(piece.shape == shape for piece, _ in pieces):
            whole, rest = pieces[0][0], [piece for piece, _ in pieces[1:]]
            if not all(_same(whole, piece) for piece in rest):
                raise self._fail("disagree", f"ranks hold different values of {name}")
            return whole
        whole = torch.zeros(shape, dtype=torch.int64 if name == "step" else torch.float32)
        covered = torch.zeros(shape, dtype=torch.bool)
        for piece, offsets in pieces:
            region = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))
            both = covered[region]
            if not _same(whole[region][both], piece[both]):
                raise self._fail("disagree", f"ranks hold different values of {name}")
            whole[region], covered[region] = piece, True
        if not bool(covered.all()):
            missing = int((~covered).sum())
            raise self._fail("garbage", f"the shards of {name} leave out {missing} of its {covered.numel()} elements")
        return whole

    def _widths(self) -> list[int]:
        m = self.target.model
        return [m.hidden_size, m.intermediate_size, m.vocab_size, m.num_attention_heads * m.head_dim]

    def _split(self, batch: Any) -> list[list[tuple[str, Tensor]]]:
        """Data rank r's rows, r * N / R to (r + 1) * N / R, with the global denominator; the ranks that hold a layer
        or a row together get the same."""
        n, s = batch.tokens.shape
        sharing = self.target.parallel.sharing
        ranks = self.ranks // sharing
        if n % ranks:
            raise UserError(f"a batch of {n} rows does not divide over {ranks} ranks", remedy="choose a multiple")
        rows, parts = n // ranks, []
        for rank in (number // sharing for number in range(self.ranks)):
            own = slice(rank * rows, (rank + 1) * rows)
            part = batch
            if ranks > 1:
                places = batch.cu_seqlens.cpu()
                first, last = rank * rows * s, (rank + 1) * rows * s
                inside = places[(places >= first) & (places < last)] - first
                cu_seqlens = torch.full((rows * s + 1,), rows * s, dtype=torch.int32)
                cu_seqlens[: inside.numel()] = inside
                part = Batch(batch.tokens[own], batch.labels[own], batch.mask[own], cu_seqlens, batch.loss_denominator)
            parts.append([(name, getattr(part, name)) for name in Batch._fields])
        return parts

    # Life and death

    def _fail(self, kind: str, message: str, detail: str = "") -> EngineFailure:
        """The failure to raise; the first one stays the reason, and the process does not outlive it."""
        if self._failure is None:
            self._failure = EngineFailure(kind, message, detail)
        self._kill()
        return self._failure

    def _exit_status(self, seconds: float) -> int | None:
        """As Popen.returncode, without reaping: until then nobody else can get the group's number, which is killed."""
        deadline = time.monotonic() + seconds
        while True:
            with self._killing:
                if self._process.returncode is not None:
                    return self._process.returncode
                code = self._process.exit_status()
            if code is not None:
                return code
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def _obituary(self) -> tuple[str, str]:
        code = self._exit_status(5.0)
        if code is None:
            return "crashed", f"the engine closed its channel{self._last_line()}"
        number = -code if code < 0 else code - 128  # what bubblewrap and the supervisor of ranks say for a signal
        name = signal.Signals(number).name if number in set(signal.Signals) else None
        how = f"was killed by {name}" if name else f"ended with exit code {code}"
        return "crashed", f"the engine's process {how}{self._last_line()}"

    def _last_line(self) -> str:
        lines = [line for line in self._printed[1].text().splitlines() if line.strip()]
        return f"; its last line on stderr: {lines[-1].strip()[:400]}" if lines else ""

    def _kill(self) -> None:
        with self._killing:
            if self._process.returncode is None:
                tree.kill(self._process.pid)
                self._process.wait()

    def _watch(self, limits: Mapping[str, int], folder: Path | None) -> None:
        while not self._closing.wait(_WATCH):
            try:
                over = tree.excess(self._process.pid, limits, folder)
            except Exception as error:  # no limit holds once nobody looks
                over = f"cannot be watched: {type(error).__name__}"
            if over is not None:
                self._fail("limit", f"the engine {over}")
                return


class _Raised(Exception):
    """The text of an exception in the engine."""


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(one), bits(other))
