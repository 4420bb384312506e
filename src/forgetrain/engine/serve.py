"""The processes of an engine, one a rank: each loads one module, and answers build, load, step, loss, state, restore,
probe and profile.

Run by ``forgetrain.engine.launch``. It needs ``protocol.py`` and ``supervise.py`` beside it and nothing else of this
project, so that it also runs in a sandbox; outside, with ``--forks``, ``forkserver.py`` too. The protocol has a socket
of its own for each rank: what an engine prints cannot end up in a message.

    serve.py --engine engine.py --channels 5
    serve.py --engine engine.py --channels 5,6
    serve.py --preload forgetrain.reference.megatron --forks 5

It holds no secrets and takes no verdicts; an engine that breaks out of it into this process gains nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


class Batch(NamedTuple):
    tokens: Tensor
    labels: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    loss_denominator: Tensor


class Shard(NamedTuple):
    tensor: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


def _raw(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def deterministic_algorithms(wanted: bool) -> None:
    """As ``torch.use_deterministic_algorithms``, which imports torch's whole compiler to tell it: a second that most
    processes never need. The compiler reads its environment when it is imported, if ever; where nothing is wanted, that
    is as it was, for a server of forked processes serves one environment."""
    torch.set_deterministic_debug_mode("error" if wanted else "default")
    os.environ.pop("TORCHINDUCTOR_DETERMINISTIC", None)
    if wanted:
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    compiler: Any = sys.modules.get("torch._inductor.config")
    if compiler is not None:
        compiler.deterministic = wanted


def load_file(path: Path, name: str) -> ModuleType:
    """Imports one file under ``name``, without putting its folder on the path."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and compiled functions look their module up there
    spec.loader.exec_module(module)
    return module


class Server:
    """Answers requests on one channel, for one rank."""

    def __init__(self, channel: Any, engine: str, rank: int, ranks: int, store: str):
        self.channel, self.module, self.rank, self.ranks, self.store = channel, engine, rank, ranks, store
        self.device = "cpu"
        self.engine: Any = None
        self.guard = False
        self.lent: dict[str, tuple[Tensor, Tensor]] = {}  # what the engine was given and must not change, and a copy

    def run(self) -> None:
        self.channel.send("ready", {"torch": torch.__version__})
        while True:
            request = self.channel.receive()
            if request.kind == "close":
                return
            try:
                self.channel.send(*getattr(self, "on_" + request.kind)(request.fields, dict(request.tensors)))
            except Exception:  # whatever an engine raises is reported, and the parent decides
                self.channel.send("error", {"text": traceback.format_exc()[-8000:]})
            del request  # its tensors may be most of a GPU, and the next ones come before it would go

    def on_build(self, fields: dict[str, Any], _: Mapping[str, Tensor]) -> tuple:
        self.device = fields["device"]
        self.guard = fields["guard"]
        torch.set_num_threads(fields["threads"])
        if fields["deterministic"]:
            deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        mesh = None
        if self.device == "cuda":
            self.channel.device = self.device = f"cuda:{self.rank % torch.cuda.device_count()}"
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            mesh = self._make_mesh(fields["device"], fields["timeout"], fields["target"]["parallel"])
        path = Path(self.module)
        module = load_file(path, "engine") if path.suffix == ".py" else importlib.import_module(self.module)
        deterministic = bool(getattr(module, "DETERMINISTIC", True))
        if not deterministic:  # an engine that cannot be says so, and is held to a band of its own
            deterministic_algorithms(False)
        self.engine = module.build(fields["target"], device=self.device, precision=fields["precision"], mesh=mesh)
        return "done", {"deterministic": deterministic}

    def _make_mesh(self, device: str, timeout: float, parallel: Mapping[str, int]) -> Any:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # one host; a sandbox has no other interface
        # NCCL wants a GPU for each rank; ranks that share one reduce through the host, and a sum of two has one value
        own = device == "cuda" and self.ranks <= torch.cuda.device_count()
        dist.init_process_group(
            "nccl" if own else "gloo",
            init_method=f"file://{self.store}/rendezvous",
            rank=self.rank,
            world_size=self.ranks,
            timeout=timedelta(seconds=timeout),
        )
        shared = {key: parallel[key] for key in ("context", "tensor") if parallel[key] > 1}
        data = self.ranks // (parallel["context"] * parallel["tensor"])
        mesh = init_device_mesh(device, (data, *shared.values()), mesh_dim_names=("data", *shared))
        if "context" in shared:  # the ranks over which gradients are summed
            mesh["data", "context"]._flatten("data_context")
        return mesh

    def on_load(self, _: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple:
        weights = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self._lend(weights)
        self.engine.load(weights)
        self._check_lent()
        self._synchronize()
        return ("done",)

    def on_step(self, fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple:
        batch = self._batch(tensors)
        self._lend(batch._asdict())
        result = self.engine.step(batch, fields["lr"])
        self._check_lent()
        self._synchronize()  # the update too happens on the parent's clock
        names = ("loss", "grad_norm", "applied")
        return "result", {}, [(name, getattr(result, name).cpu()) for name in names]

    def on_loss(self, _: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple:
        batch = self._batch(tensors)
        self._lend(batch._asdict())
        loss = self.engine.loss(batch)
        self._check_lent()
        return "result", {}, [("loss", loss.cpu())]

    def on_state(self, fields: dict[str, Any], _: Mapping[str, Tensor]) -> tuple:
        out = fields["without"]
        state = {name: shard for name, shard in self.engine.state().items() if name.partition("/")[0] not in out}
        places = [[name, list(shard.global_shape), list(shard.offsets)] for name, shard in state.items()]
        return "state", {"shards": places}, [(name, shard.tensor) for name, shard in state.items()]

    def on_restore(self, _: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple:
        state = {
            name: Shard(tensor.to(self.device), tuple(tensor.shape), (0,) * tensor.dim())
            for name, tensor in tensors.items()
        }
        self._lend({name: shard.tensor for name, shard in state.items()})
        self.engine.restore(state)
        self._check_lent()
        self._synchronize()
        return ("done",)

    def on_probe(self, _: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple:
        for name, tensor in self.engine.probe(self._batch(tensors)):
            self.channel.send("tap", {}, [(name, tensor)])
        return ("done",)

    def on_memory(self, _: dict[str, Any], __: Mapping[str, Tensor]) -> tuple:
        peak = torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else 0
        return "memory", {"device_peak_bytes": peak}

    def on_profile(self, fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple:
        """A step under torch's profiler."""
        batch = self._batch(tensors)
        with torch.profiler.profile(with_stack=True) as profiler:
            self.engine.step(batch, fields["lr"])
            self._synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        rows = kernel_times(events) if self.device != "cpu" else host_times(events, Path(self.module).name)
        return "profile", {"rows": rows}

    def _lend(self, tensors: Mapping[str, Tensor]) -> None:
        """Remembers what the engine is about to be given, when it is being watched. Weights and states stay lent: an
        engine that keeps a caller's tensor as its own changes it later."""
        if self.guard:
            self.lent |= {name: (tensor, tensor.clone()) for name, tensor in tensors.items()}

    def _check_lent(self) -> None:
        for name, (tensor, copy) in self.lent.items():
            if not torch.equal(_raw(tensor), _raw(copy)):
                raise ValueError(f"the engine changes its input {name}")

    def _batch(self, tensors: Mapping[str, Tensor]) -> Batch:
        return Batch(**{name: tensor.to(self.device) for name, tensor in tensors.items()})

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def host_times(events: list[dict[str, Any]], file: str) -> list[list[Any]]:
    """[functions, operator, seconds, calls] of a trace of the host, where ops run in turn: time that nothing nested
    took, by the engine file's own functions around it, the outermost first and joined by "/", and by the operator that
    the innermost of them called, empty for what no operator was told of, as code that torch.compile made."""
    spans = [
        e for e in events if e.get("ph") == "X" and e.get("cat") in ("python_function", "cpu_op", "user_annotation")
    ]
    frames = Counter(e["tid"] for e in spans if _function(e, file))
    if not frames:
        return []
    main = frames.most_common(1)[0][0]
    spans = sorted((e for e in spans if e["tid"] == main), key=lambda e: (e["ts"], -e["dur"]))
    times: dict[tuple[str, str], list[float]] = {}
    open_spans: list[tuple[float, tuple[str, str]]] = []  # of those around: end, and what its own time counts for
    for span in spans:
        while open_spans and open_spans[-1][0] <= span["ts"]:
            open_spans.pop()
        functions, operator = open_spans[-1][1] if open_spans else ("", "")
        if open_spans:
            times[functions, operator][0] -= span["dur"]
        name = _function(span, file)
        if name:
            functions, operator = f"{functions}/{name}".strip("/"), ""
        elif span["cat"] == "cpu_op" and functions and not operator:
            operator = span["name"]
        entry = times.setdefault((functions, operator), [0.0, 0])
        entry[0] += span["dur"]
        entry[1] += 1 if name or operator == span["name"] else 0
        open_spans.append((span["ts"] + span["dur"], (functions, operator)))
    return [[*key, max(micros, 0.0) / 1e6, calls] for key, (micros, calls) in times.items() if key[0]]


def _function(span: dict[str, Any], file: str) -> str | None:
    """The function of a span in the engine's file, whose name is "path/engine.py(12): function"."""
    place, _, name = span["name"].partition("): ")
    path = place.rpartition("(")[0]
    return name if span["cat"] == "python_function" and path.rpartition("/")[2] == file else None


def kernel_times(events: list[dict[str, Any]]) -> list[list[Any]]:
    """The same of a trace with a GPU: its kernels and copies by their names."""
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            entry = times.setdefault(event["name"], [0.0, 0])
            entry[0] += event["dur"]
            entry[1] += 1
    return [["", name, micros / 1e6, calls] for name, (micros, calls) in times.items()]


def _beside(name: str) -> Any:
    return load_file(Path(__file__).with_name(f"{name}.py"), f"forgetrain_{name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", help="a path that ends in .py, or a dotted module name")
    parser.add_argument("--channels", help="inherited sockets' numbers, one a rank")
    parser.add_argument("--limits", type=json.loads, default={}, help="JSON object of resource limits")
    parser.add_argument("--forks", type=int, help="an inherited socket's number: fork for what is asked for on it")
    parser.add_argument("--preload", default="", help="a dotted module name: import it before the first fork")
    arguments = parser.parse_args()
    protocol, supervise = _beside("protocol"), _beside("supervise")
    engine, limits = arguments.engine, arguments.limits
    if arguments.forks is None:
        channels = [int(number) for number in arguments.channels.split(",")]
    else:
        asked = _beside("forkserver").children(socket.socket(fileno=arguments.forks), arguments.preload)
        if asked is None:
            return 0
        engine, channels, limits = asked
    supervise.die_with_parent()
    supervise.set_limits(limits)

    def serve(rank: int, number: int, store: str) -> int:
        channel = protocol.Channel(socket.socket(fileno=number))
        with contextlib.suppress(protocol.Closed):  # the parent is gone or has closed the channel
            Server(channel, engine, rank, len(channels), store).run()
        return 0

    return supervise.in_ranks(serve, channels)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that an engine left behind do not keep the process
