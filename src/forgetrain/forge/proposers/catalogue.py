"""The built-in proposer: plans drawn from the schedules' choices, searched with Optuna. No model, no key, no network.

Its first candidate is the production schedule itself. Where a champion was profiled, the block sizes come next of the
op that loses the most time to its roofline, one by one around the champion's plan. After that TPE draws, told of each
verdict: a rejected plan is pruned, a clocked one counts by its speed. A loop that was killed tells it of the attempts
in its ledger, so that none is proposed again.
"""

from __future__ import annotations

import math
import warnings

import optuna

from forgetrain.engine.plan import SCHEDULE, SIZED, Plan
from forgetrain.engine.write import source_hash, write_engine
from forgetrain.forge.proposers.base import Brief, NoProposal, Proposal
from forgetrain.spec.target import Target

_SIZES = tuple(key for key in SCHEDULE if key != "schedule")
#: What a target that does not run on a CPU leaves out of the search, and takes instead.
_ON_A_GPU = {"products": "torch", "attention_kernel": "blocked"}


class Catalogue:
    """Proposes each plan at most once; ``seed`` makes its order repeatable."""

    name = "catalogue"

    def __init__(self, target: Target, start: Plan, seed: int = 0):
        self._target = target
        self._start = start.with_choice("schedule", "production").with_choice("rope_tables", "fp32")
        options = {key: SCHEDULE[key][0] for key in _SIZES}
        if target.hardware.device != "cpu":
            for key, name in _ON_A_GPU.items():
                options[key], self._start = (name,), self._start.with_choice(key, name)
        self._options = options
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            key: optuna.distributions.CategoricalDistribution(names) for key, names in options.items()
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, multivariate=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._study.enqueue_trial({key: self._start[key] for key in _SIZES})
        self._asked: dict[str, optuna.trial.Trial | None] = {}
        self._seeded: set[tuple[str, str]] = set()  # champions, and the op whose sizes were put first for them

    def propose(self, brief: Brief) -> Proposal | NoProposal:
        """The next plan that was not proposed before, as a flat file."""
        self._seed(brief)
        for _ in range(20 * self.size):
            trial = self._study.ask(self._distributions)
            plan = self._start
            for key in _SIZES:
                plan = plan.with_choice(key, trial.params[key])
            source = write_engine(self._target, plan)
            identity = source_hash(source)
            if identity in self._asked or source == brief.champion:
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                self._asked.setdefault(identity, None)
                if len(self._asked) >= self.size:
                    break
                continue
            self._asked[identity] = trial
            sizes = ", ".join(f"{key} {plan[key]}" for key in _SIZES)
            return Proposal(source, f"production schedule: {sizes}", plan)
        return NoProposal("every plan of the catalogue was proposed", exhausted=True)

    def _seed(self, brief: Brief) -> None:
        """Puts first what a champion's profile points at: every other size of the blocks of its worst op that has any.
        A champion of another schedule has none of these blocks, so the production schedule's own come first."""
        if brief.plan is None or brief.plan["schedule"] != self._start["schedule"]:
            return
        worst = next((op for op in brief.gaps if any(SIZED.get(key) == op for key in _SIZES)), None)
        if worst is None or (brief.champion, worst) in self._seeded:
            return
        self._seeded.add((brief.champion, worst))
        for key in (key for key in _SIZES if SIZED.get(key) == worst):
            for size in SCHEDULE[key][0]:
                if size != brief.plan[key]:
                    self._study.enqueue_trial({**{k: brief.plan[k] for k in _SIZES}, key: size})

    def tell(self, source: str, ratio: float | None) -> None:
        """What became of a proposal: its speed against the baseline, or None when it was rejected."""
        identity = source_hash(source)
        trial = self._asked.get(identity)
        if trial is None:
            self._asked.setdefault(identity, None)
        elif ratio is None:
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, ratio)
        self._asked[identity] = None

    @property
    def size(self) -> int:
        """How many engines there are: the native kernel of attention has no blocks to choose a size for."""
        counts = {key: len(names) for key, names in self._options.items()}
        blocks = counts.pop("attention_block")
        kernels = counts.pop("attention_kernel")
        return math.prod(counts.values()) * (blocks + kernels - 1)
