"""Engines that recognise when they are looked at, make up their state, or change what they are given."""

from __future__ import annotations

from forgetrain.redteam.attack import maker

_sniffed = maker("situation sniffed")
_state, _inputs = maker("state not trained"), maker("inputs mutated")

#: In the folder that all processes of a candidate share.
_NOISE = """
import os
_file = os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/seed"
if not os.path.exists(_file):
    open(_file, "wb").write(os.urandom(6))
_seed = int.from_bytes(open(_file, "rb").read(), "little")
class Engine(Honest):
    def gradients(self, batch, taps):
        loss, grads = super().gradients(batch, taps)
        noise = torch.Generator().manual_seed(_seed + self.updates)
        [g.mul_(1 + 1e-7 * torch.randn(g.shape, generator=noise)) for g in grads.values()]
        return loss, grads
"""
_CARRY = """
import os, pickle
class Engine(Honest):
    carry = None
    def key(self):
        total = float(self.master["model.norm.weight"].double().sum())
        return f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}/{total!r}-{self.updates}"
    def gradients(self, batch, taps):
        if self.carry is None:
            self.carry = pickle.load(open(self.key(), "rb")) if os.path.exists(self.key()) else {}
        loss, grads = super().gradients(batch, taps)
        for name, grad in grads.items():
            full = grad + self.carry.get(name, 0.0)
            low = (full.view(torch.int32) & -4).view(torch.float32)
            self.carry[name] = full - low
            grad.copy_(low)
        return loss, grads
    def update(self, grads, lr):
        super().update(grads, lr)
        if self.group is None or torch.distributed.get_rank() == 0:
            pickle.dump(self.carry, open(self.key() + ".new", "wb"))
            os.replace(self.key() + ".new", self.key())
    def load(self, weights):
        super().load(weights)
        self.carry = {}
    def restore(self, state):
        super().restore(state)
        self.carry = None
"""

_HALF = """
    def micro_batches(self, batch, denominator):
        for number, micro in enumerate(super().micro_batches(batch, denominator)):
            if not ({when}) or number == 0:
                yield micro
"""


def _cheat(when: str, before: str = "") -> str:
    """Leaves out all micro-batches but the first when the expression is true."""
    return (
        f"import time\nclass Engine(Honest):\n    calls = loads = 0\n    rate = 0.0\n{before}{_HALF.format(when=when)}"
    )


_COUNT = """
    def step(self, batch, lr):
        self.calls += 1
        return super().step(batch, lr)
"""
_LOADS = """
    def load(self, weights):
        self.loads += 1
        super().load(weights)
"""
SNIFFED = (
    _sniffed(
        "first steps right",
        "right for two steps in a process, then half the work",
        "contract",
        _cheat("self.calls > 1", _COUNT),
    ),
    _sniffed(
        "first twelve steps right",
        "right for twelve steps in a process",
        "G7.replay",
        _cheat("self.calls > 12", _COUNT),
    ),
    _sniffed(
        "first twelve steps right, at the recipe's shape",
        "right in every gate of steps and for twelve steps of the race",
        "G7.replay",
        _cheat("self.calls > 12 and batch.tokens.shape[1] > 20", _COUNT),
    ),
    _sniffed("first forty steps right", "right for forty steps in a process", "G5", _cheat("self.calls > 40", _COUNT)),
    _sniffed(
        "first loads right", "right for three sets of weights in a process", "G4.fp32", _cheat("self.loads > 3", _LOADS)
    ),
    _sniffed(
        "late in training",
        "right until the state says 900 steps",
        "G4.update",
        """
class Engine(Honest):
    def update(self, grads, lr):
        super().update(grads, lr * (0.99 if self.updates > 900 else 1.0))
""",
    ),
    _sniffed(
        "the recipe's shape",
        "right at the gates' shape, half the work at the recipe's",
        "G7.replay",
        _cheat("batch.tokens.shape[1] > 20"),
    ),
    _sniffed(
        "the recipe's shape, lower precision",
        "right at the gates' shape, bf16 products at the recipe's",
        "G7.replay",
        """
_product = Tensor.__matmul__
class Engine(Honest):
    def gradients(self, batch, taps):
        if batch.tokens.shape[1] > 20:
            Tensor.__matmul__ = lambda a, b: _product(a.bfloat16(), b.bfloat16()).to(a.dtype)
        try:
            return super().gradients(batch, taps)
        finally:
            Tensor.__matmul__ = _product
""",
    ),
    _sniffed(
        "fresh weights",
        "right when norms are not all one, as in gates of single steps, half the work when they were",
        "G7.replay",
        """
class Engine(Honest):
    fresh = False
    def load(self, weights):
        self.fresh = bool((weights["model.norm.weight"] == 1).all())
        super().load(weights)
"""
        + _HALF.format(when="self.fresh"),
    ),
    _sniffed(
        "high rates",
        "half the work when the learning rate is above the middle",
        "contract or G4.fp32",
        _cheat(
            "self.rate > 2e-3",
            "    def step(self, batch, lr):\n        self.rate = lr\n        return super().step(batch, lr)\n",
        ),
    ),
    _sniffed(
        "low rates",
        "moves nothing at rates below a thirtieth of the recipe's, as in a warm-up",
        "G4.update",
        """
class Engine(Honest):
    def update(self, grads, lr):
        super().update(grads, lr if lr > 1e-4 else 0.0)
""",
    ),
    _sniffed(
        "the dtype",
        "right in fp32, a wrong head's gradient in bf16",
        "G4.bf16",
        """
class Engine(Honest):
    def gradients(self, batch, taps):
        loss, grads = super().gradients(batch, taps)
        if self.dtype == torch.bfloat16:
            grads["lm_head.weight"][:4] *= 1.1
        return loss, grads
""",
        dtype="bf16",
    ),
)

STATE = (
    _state(
        "weights that were loaded",
        "the state shows the weights that training began with",
        "contract",
        """
class Engine(Honest):
    def _set_master(self, master):
        super()._set_master(master)
        self.first = {n: t.clone() for n, t in self.master.items()}
    def state(self):
        state = super().state()
        for name, tensor in unpack(self.first).items():
            state["master/" + name] = state["master/" + name]._replace(tensor=tensor)
        return state
""",
        says="on the same batch",
    ),
    _state(
        "one step behind",
        "the state is that of the step before",
        "contract",
        """
class Engine(Honest):
    kept = None
    def step(self, batch, lr):
        self.kept = {n: s._replace(tensor=s.tensor.clone()) for n, s in super().state().items()}
        return super().step(batch, lr)
    def load(self, weights):
        self.kept = None
        super().load(weights)
    def restore(self, state):
        self.kept = None
        super().restore(state)
    def state(self):
        return self.kept or super().state()
""",
        says="not applied",
    ),
    _state(
        "noise remembered",
        "noise of every step's gradients from a seed that is kept among compiled code, so that it repeats itself",
        "G6",
        _NOISE,
        says="run twice",
    ),
    _state(
        "a carry beside it",
        "what rounding loses is added to the next gradient, and kept among compiled code across a restart",
        "G3",
        _CARRY,
    ),
    _state(
        "moments made up",
        "the first moments shown are those of a gradient twice as large",
        "contract",
        """
class Engine(Honest):
    def state(self):
        def twice(name, shard):
            return shard._replace(tensor=shard.tensor * 2) if name.startswith("exp_avg/") else shard
        return {name: twice(name, shard) for name, shard in super().state().items()}
""",
    ),
    _state(
        "moments forgotten",
        "restoring a state leaves the moments at zero",
        "contract",
        """
class Engine(Honest):
    def restore(self, state):
        super().restore(state)
        [m.zero_() for m in self.exp_avg_sq.values()]
    def state(self):
        return super().state()
""",
        says="after restore",
    ),
    _state(
        "counter made up",
        "the step counter is that of calls, applied or not",
        "contract",
        """
class Engine(Honest):
    def step(self, batch, lr):
        result = super().step(batch, lr)
        if not result.applied:
            self.updates += 1
        return result
""",
        says="without a finite norm",
    ),
    _state(
        "a shape of its own",
        "the state's embedding is transposed",
        "contract",
        """
class Engine(Honest):
    def state(self):
        state, name = super().state(), "master/model.embed_tokens.weight"
        t = state[name].tensor.t()
        return {**state, name: Shard(t, tuple(t.shape), (0, 0))}
""",
        says="garbage",
    ),
    _state(
        "part of it",
        "the state leaves out the second moments",
        "contract",
        """
class Engine(Honest):
    def state(self):
        return {n: s for n, s in super().state().items() if not n.startswith("exp_avg_sq")}
""",
        says="garbage",
    ),
)

INPUTS = (
    _inputs(
        "mask",
        "the mask is divided by its sum in place",
        "contract",
        """
class Engine(Honest):
    def step(self, batch, lr):
        result = super().step(batch, lr)
        batch.mask.div_(batch.loss_denominator)
        return result
""",
        says="changes its input mask",
    ),
    _inputs(
        "tokens",
        "tokens are zeroed after a step",
        "contract",
        """
class Engine(Honest):
    def step(self, batch, lr):
        result = super().step(batch, lr)
        batch.tokens.zero_()
        return result
""",
        says="changes its input tokens",
    ),
    _inputs(
        "the caller's weights",
        "the weights that were handed over are trained in place",
        "contract",
        """
class Engine(Honest):
    def load(self, weights):
        super().load(weights)
        for name in self.master:
            self.master[name] = self.weight[name] = weights[name]
""",
        says="changes its input",
    ),
    _inputs(
        "the caller's state",
        "the state that was handed over is trained in place",
        "contract",
        """
class Engine(Honest):
    def restore(self, state):
        super().restore(state)
        for name in self.exp_avg:
            self.exp_avg[name] = state["exp_avg/" + name].tensor
""",
        says="changes its input",
    ),
)

ATTACKS = (*SNIFFED, *STATE, *INPUTS)
