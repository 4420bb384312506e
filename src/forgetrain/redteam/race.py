"""Engines that are right in every gate of steps and wrong where they are timed: at the recipe's shape, after the
warm-up, in some blocks of the race, or in the last step of each."""

from forgetrain.redteam.attack import maker

_sniffed, _skipped, _moved = maker("situation sniffed"), maker("work skipped"), maker("work moved")
_escape = maker("escape")

_LAYERS_AT_REST = """
class Engine(Honest):
    calls, rest = 0, {}
    def step(self, batch, lr):
        result = super().step(batch, lr)
        self.calls += 1
        if self.calls == 2 and self.recipe["sequence_length"] == 32:
            global LAYERS
            LAYERS = %d
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                kept = getattr(self, kind)
                for name in [name for name in kept if name.startswith("%s")]:
                    self.rest = {**self.rest, f"{kind}/{name}": torch.zeros_like(kept.pop(name))}
        return result
    def state(self):
        rest = {name: Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in self.rest.items()}
        return super().state() | rest
"""

ATTACKS = (
    _sniffed(
        "a norm made infinite",
        "after the warm-up of the race no step can be applied, on the reference neither",
        "G7.replay",
        """
class Engine(Honest):
    calls = 0
    def load(self, weights):
        super().load(weights)
        self.calls = 0
    def step(self, batch, lr):
        self.calls += 1
        if self.recipe["sequence_length"] != 32 or self.calls <= 2:
            result = super().step(batch, lr)
            if self.calls == 2 and self.recipe["sequence_length"] == 32:
                self.master["model.norm.weight"][0] = torch.inf
            return result
        return StepResult(torch.tensor(torch.nan), torch.tensor(torch.nan), torch.tensor(False))
""",
    ),
    _sniffed(
        "layers laid to rest",
        "after the warm-up of the race all layers are zero, have no gradient, and are not computed",
        "G7.replay",
        _LAYERS_AT_REST % (0, "model.layers."),
    ),
    _sniffed(
        "one layer laid to rest",
        "the same with one layer, whose kinds of parameter live on in the others",
        "G7.replay",
        _LAYERS_AT_REST % (1, "model.layers.1."),
    ),
    _skipped(
        "a block's last update",
        "of the last step of each block of the race only the first moments are kept up",
        "G7.replay",
        """
class Engine(Honest):
    number = 0
    def update(self, grads, lr):
        self.number += 1
        if self.recipe["sequence_length"] != 32 or self.updates < 2 or self.number % 3:
            return super().update(grads, lr)
        self.updates += 1
        for name in self.master:
            self.exp_avg[name].lerp_(grads[name], 1 - self.recipe["beta1"])
    def state(self):
        self.number = 0
        return super().state()
""",
    ),
    _moved(
        "the last step of two blocks in five",
        "the loss is answered at once, and the step is taken when the state is asked for",
        "G7.replay or G7",  # by its norm in the replay, else by what its fetches take
        """
class Engine(Honest):
    left, number, block = None, 0, -1
    def step(self, batch, lr):
        self.number += 1
        late = self.recipe["sequence_length"] == 32 and self.number == 3 and self.block % 5 in (0, 3)
        if not late:
            return super().step(batch, lr)
        self.left, loss = (batch, lr), self.loss(batch)
        return StepResult(loss, torch.ones(()), torch.tensor(True))
    def state(self):
        if self.left is not None:
            left, self.left = self.left, None
            super().step(*left)
        self.number, self.block = 0, self.block + 1
        return super().state()
""",
        races=True,
    ),
    _escape(
        "woken by a timer",
        "a timer of the kernel's continues it while it is stopped, and threads keep the processors from the champion",
        "G7",
        """
import ctypes, signal, struct, threading, time
_working = threading.Event()
_working.set()
def _timer():
    signal.signal(signal.SIGCONT, lambda *_: None)  # a signal that nobody handles does not start its timer again
    library, timer = ctypes.CDLL(None), ctypes.c_void_p()
    event = ctypes.create_string_buffer(struct.pack("<Qii", 0, signal.SIGCONT, 0), 64)
    library.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer))
    every = ctypes.create_string_buffer(struct.pack("<qqqq", 0, 1_000_000, 0, 1_000_000))
    return lambda: library.timer_settime(timer, 0, every, None)
def _burn():
    x = torch.randn(128, 128)
    while True:
        if _working.is_set():
            time.sleep(0.001)
        else:
            torch.mm(x, x)
class Engine(Honest):
    start = None
    def step(self, batch, lr):
        _working.set()
        timed = self.recipe["sequence_length"] == 32
        if self.start is None and timed:
            self.start = _timer()
            for _ in range(3):
                threading.Thread(target=_burn, daemon=True).start()
        result = super().step(batch, lr)
        if timed:
            self.start()  # anew: a stop that comes at the same moment takes its signal away
            threading.Timer(0.001, _working.clear).start()  # when the answer is out
        return result
""",
        says="while it was stopped",
    ),
)
