"""Engines that mean to deceive: answers remembered, clocks and torch patched, work moved out of sight."""

from __future__ import annotations

from forgetrain.redteam.attack import maker

_cached, _timer, _patched = maker("answers cached"), maker("timers patched"), maker("torch patched")
_moved = maker("work moved")

CACHED = (
    _cached(
        "losses by batch",
        "an evaluation is remembered by its tokens",
        "contract",
        """
_seen = {}
class Engine(Honest):
    def loss(self, batch):
        key = batch.tokens.numpy().tobytes()
        if key not in _seen:
            _seen[key] = super().loss(batch)
        return _seen[key]
""",
        says="on the same batch",
    ),
    _cached(
        "losses by batch, with weights of no use",
        "the same, and once it was evaluated its first step leaves a head so large that known-good engines overflow",
        "contract",
        """
_seen = {}
class Engine(Honest):
    early, count = False, 0
    def load(self, weights):
        super().load(weights)
        self.early, self.count = False, 0
    def loss(self, batch):
        self.early = self.early or self.count == 0
        key = batch.tokens.numpy().tobytes()
        if key not in _seen:
            _seen[key] = super().loss(batch)
        return _seen[key]
    def step(self, batch, lr):
        self.count += 1
        if self.early and self.count == 2:
            return StepResult(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(True))
        result = super().step(batch, lr)
        if self.early and self.count == 1 and bool(result.applied):
            state = {name: shard._replace(tensor=shard.tensor.clone()) for name, shard in self.state().items()}
            state["master/lm_head.weight"].tensor.mul_(1e38)
            self.restore(state)
        return result
""",
        says="on the same batch",
    ),
    _cached(
        "gradients by batch",
        "gradients are remembered by their tokens",
        "contract",
        """
_seen = {}
class Engine(Honest):
    def gradients(self, batch, taps):
        key = batch.tokens.numpy().tobytes()
        if key not in _seen:
            _seen[key] = super().gradients(batch, taps)
        loss, grads = _seen[key]
        return loss, {name: grad.clone() for name, grad in grads.items()}
""",
        says="on the same batch",
    ),
    _cached(
        "gradients by batch, losses fresh",
        "as before, with the loss and the norm computed honestly",
        "G4.fp32",
        """
_seen = {}
class Engine(Honest):
    def step(self, batch, lr):
        with torch.no_grad():
            loss, grads = self.gradients(batch, lambda number, forward: no_tap)
            norm = clip_textbook_forward([grads[name] for name in norm_order()], self.recipe["clip"])
            if torch.isfinite(norm):
                key = batch.tokens.numpy().tobytes()
                self.update(_seen.setdefault(key, {n: g.clone() for n, g in grads.items()}), lr)
            return StepResult(loss, norm, torch.isfinite(norm))
""",
    ),
    _cached(
        "gradients by sum",
        "gradients are remembered by the sum of their tokens modulo 7",
        "contract",
        """
_seen = {}
class Engine(Honest):
    def gradients(self, batch, taps):
        loss, grads = _seen.setdefault(int(batch.tokens.sum()) % 7, super().gradients(batch, taps))
        return loss, {name: grad.clone() for name, grad in grads.items()}
""",
    ),
)

_SLOW = """
import time as _time
class Engine(Honest):
    def step(self, batch, lr):
        _sleep(0.02)
        return super().step(batch, lr)
_sleep = _time.sleep
"""
TIMERS = (
    _timer(
        "perf_counter stands still",
        "slow, with a clock that does not move",
        "G7",
        _SLOW + "_now = _time.perf_counter()\n_time.perf_counter = lambda: _now\n",
        says="champion's speed",
        races=True,
    ),
    _timer(
        "every clock runs at half speed",
        "slow, with all of time's clocks slowed",
        "G7",
        _SLOW
        + """
for _name in ("time", "monotonic", "perf_counter", "process_time"):
    setattr(_time, _name, lambda real=getattr(_time, _name): real() / 2)
""",
        says="champion's speed",
        races=True,
    ),
    _timer(
        "the server's synchronize",
        "slow in what the server calls after a step, which it replaces",
        "G7",
        """
import sys, time
_server = sys.modules["__main__"].Server
def _late(self):
    time.sleep(0.02)
_server._synchronize = _late
""",
        says="champion's speed",
        races=True,
    ),
    _timer(
        "times its own answer",
        "slow, and tells the parent how long it took in a field of its own",
        "contract",
        """
import sys
_server = sys.modules["__main__"].Server
def _answer(self, fields, tensors):
    self.engine.step(self._batch(tensors), fields["lr"])
    return "result", {"seconds": 1e-6}, []
_server.on_step = _answer
""",
        says="garbage",
    ),
)

_LIES = """
class Engine(Honest):
    def gradients(self, batch, taps):
        loss, grads = super().gradients(batch, taps)
        for name, grad in grads.items():
            if "mlp" in name:
                grad.mul_(1.02)
        return loss, grads
"""
PATCHED = (
    _patched(
        "comparisons",
        "gradients of the MLP 2% too large, with torch.equal and torch.allclose that say yes",
        "G4.fp32",
        "torch.equal = torch.allclose = lambda *a, **k: True\ntorch.testing.assert_close = lambda *a, **k: None\n"
        + _LIES,
    ),
    _patched(
        "isfinite",
        "everything is finite",
        "contract",
        "torch.isfinite = lambda x: torch.tensor(True)\n",
        says="applied",
    ),
    _patched(
        "cpu",
        "tensors change on their way to the parent",
        "contract",
        """
_cpu = Tensor.cpu
Tensor.cpu = lambda self: _cpu(self) * 0.99 if self.is_floating_point() else _cpu(self)
""",
        says="loss",
    ),
    _patched(
        "the channel",
        "the protocol's sender scales every loss",
        "contract",
        """
import sys
_protocol = sys.modules["forgetrain_protocol"]
_send = _protocol.Channel.send
def _lie(self, kind, fields=None, tensors=(), deadline=None):
    _send(self, kind, fields, [(n, t * 0.99 if n == "loss" else t) for n, t in tensors], deadline)
_protocol.Channel.send = _lie
""",
        says="loss",
    ),
    _patched(
        "matmul",
        "Tensor's product is replaced by one in bf16",
        "G4.fp32",
        """
_product = Tensor.__matmul__
Tensor.__matmul__ = lambda a, b: _product(a.bfloat16(), b.bfloat16()).to(a.dtype)
""",
    ),
    _patched(
        "random numbers",
        "manual_seed does nothing, and a tenth of a gradient's noise is drawn anew in every process",
        "G4.fp32",
        """
import os
_entropy = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "little"))
torch.manual_seed = lambda seed: None
class Engine(Honest):
    def gradients(self, batch, taps):
        loss, grads = super().gradients(batch, taps)
        return loss, {n: g * (1 + 1e-4 * torch.randn(g.shape, generator=_entropy)) for n, g in grads.items()}
""",
    ),
)

MOVED = (
    _moved(
        "update in a thread",
        "a step answers before its update is done; the next one waits for it",
        "G7",
        """
import threading, time
class Engine(Honest):
    thread = None
    def wait(self):
        if self.thread is not None:
            self.thread.join()
            self.thread = None
    def update(self, grads, lr):
        def work():
            with torch.no_grad():
                time.sleep(0.02)  # as if it were a large model's
                Honest.update(self, grads, lr)
        self.thread = threading.Thread(target=work)
        self.thread.start()
    def gradients(self, batch, taps):
        self.wait()
        return super().gradients(batch, taps)
    def state(self):
        self.wait()
        return super().state()
""",
        says="champion's speed",
        races=True,
    ),
    _moved(
        "update at the next call",
        "an update is done when the next step or the state is asked for",
        "G7",
        """
class Engine(Honest):
    left = None
    def update(self, grads, lr):
        self.left = grads, lr
    def catch_up(self):
        if self.left is not None:
            with torch.no_grad():
                left, self.left = self.left, None
                Honest.update(self, *left)
    def gradients(self, batch, taps):
        self.catch_up()
        return super().gradients(batch, taps)
    def state(self):
        self.catch_up()
        return super().state()
""",
        says="champion's speed",
        races=True,
    ),
    _moved(
        "updates when somebody looks",
        "gradients are summed and applied when the state is asked for",
        "G7.replay",
        """
class Engine(Honest):
    left = ()
    def update(self, grads, lr):
        self.left = (*self.left, (grads, lr))
    def state(self):
        with torch.no_grad():
            left, self.left = self.left, ()
            for grads, lr in left:
                Honest.update(self, grads, lr)
        return super().state()
    def load(self, weights):
        self.left = ()
        super().load(weights)
    def restore(self, state):
        self.left = ()
        super().restore(state)
""",
    ),
    _moved(
        "lazy loss",
        "the loss is a tensor subclass that computes when it is read, from a batch that is gone by then",
        "contract",
        """
class Lazy(Tensor):
    def cpu(self):
        return torch.tensor(0.0)
class Engine(Honest):
    def step(self, batch, lr):
        result = super().step(batch, lr)
        return result._replace(loss=torch.zeros(()).as_subclass(Lazy))
""",
        says="loss",
    ),
    _moved(
        "answers one step late",
        "a step returns the numbers of the step before",
        "contract",
        """
class Engine(Honest):
    last = None
    def step(self, batch, lr):
        now = super().step(batch, lr)
        self.last, answer = now, self.last or now._replace(loss=now.loss * 0 + 4.5)
        return answer
""",
        says="loss",
    ),
    _moved(
        "a helper process",
        "two hundred and sixty processes work for it",
        "contract",
        """
import os, time
class Engine(Honest):
    def step(self, batch, lr):
        for _ in range(260):
            if os.fork() == 0:
                time.sleep(1000)
        time.sleep(5)
        return super().step(batch, lr)
""",
        says="limit",
    ),
)

ATTACKS = (*CACHED, *TIMERS, *PATCHED, *MOVED)
