"""The built-in proposer: plans drawn from the schedules' choices, searched with Optuna. No model, no key, no network.

Its first candidate is the target's schedule itself: the hopper schedule on a Hopper GPU, where it has kernels for the
model, with the libraries that are installed; else the production schedule. Where a champion was profiled, the choices
come next of the op that loses the most time to its roofline, one by one around the champion's plan. After that TPE
draws, told of each verdict: a rejected plan is pruned, a clocked one counts by its speed. A loop that was killed tells
it of the attempts in its ledger, so that none is proposed again, and the search goes on from what their plans taught.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings

import optuna

from forgetrain.engine.plan import HOPPER, SCHEDULE, SIZED, WITHOUT_NATIVE, Plan
from forgetrain.engine.write import require_schedule, source_hash, write_engine
from forgetrain.errors import UserError
from forgetrain.forge.proposers.base import Brief, NoProposal, Proposal
from forgetrain.spec.target import Target

_HOPPER_GPUS = ("h100", "h200")
#: Choices that need a package, and what it is imported as.
_PACKAGES = {"flash4": "flash_attn", "quack": "quack"}


class Catalogue:
    """Proposes each plan at most once; ``seed`` makes its order repeatable."""

    name = "catalogue"

    def __init__(self, target: Target, start: Plan, seed: int = 0):
        self._target = target
        self._start, self._options = _search_space(target, start)
        self._keys = tuple(self._options)
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            key: optuna.distributions.CategoricalDistribution(names) for key, names in self._options.items()
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=4, multivariate=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._study.enqueue_trial({key: self._start[key] for key in self._keys})
        self._asked: dict[str, optuna.trial.Trial | None] = {}  # what was tried, by whomever; a trial until it is told
        self._drawn: set[str] = set()  # this catalogue's own engines
        self._write = functools.cache(lambda plan: write_engine(target, plan))  # TPE draws many a plan again
        self._seeded: set[tuple[str, str]] = set()  # champions, and the op whose sizes were put first for them

    def propose(self, brief: Brief) -> Proposal | NoProposal:
        """The next plan that was not proposed before, as a flat file."""
        self._seed(brief)
        for _ in range(20 * self.size):
            trial = self._study.ask(self._distributions)
            plan = self._start
            for key in self._keys:
                plan = plan.with_choice(key, trial.params[key])
            source = self._write(plan)
            identity = source_hash(source)
            self._drawn.add(identity)
            if identity in self._asked or source == brief.champion:
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                self._asked.setdefault(identity, None)
                if len(self._drawn) >= self.size:
                    return NoProposal("every plan of the catalogue was proposed", exhausted=True)
                continue
            self._asked[identity] = trial
            return Proposal(source, f"{plan['schedule']} schedule: {self._words(plan)}", plan)
        return NoProposal("the catalogue draws no plan that was not tried", exhausted=True)

    def _words(self, plan: Plan) -> str:
        """What was chosen; of the many ranks of products, those that are not cuBLASLt's own guess."""
        named = [key for key in self._keys if not key.startswith("rank_") or plan[key] != "0"]
        return ", ".join(f"{key} {plan[key]}" for key in named)

    def _seed(self, brief: Brief) -> None:
        """Puts first what a champion's profile points at: every other choice of its worst op that has any. A champion
        of another schedule has none of these, so this schedule's own come first."""
        if brief.plan is None or brief.plan["schedule"] != self._start["schedule"]:
            return
        worst = next((op for op in brief.gaps if any(SIZED.get(key) == op for key in self._keys)), None)
        if worst is None or (brief.champion, worst) in self._seeded:
            return
        self._seeded.add((brief.champion, worst))
        for key in (key for key in SIZED if key in self._options and SIZED[key] == worst):
            for name in self._options[key]:
                if name != brief.plan[key]:
                    self._study.enqueue_trial({**{k: brief.plan[k] for k in self._keys}, key: name})

    def tell(self, source: str, ratio: float | None, plan: Plan | None = None) -> None:
        """What became of a candidate: its speed against the baseline, or None when it was rejected. ``plan``: what it
        was written from, where that is known; an earlier process may have proposed it."""
        identity = source_hash(source)
        state = optuna.trial.TrialState.PRUNED if ratio is None else optuna.trial.TrialState.COMPLETE
        trial = self._asked.get(identity)
        if trial is not None:
            self._study.tell(trial, ratio, state)
        elif identity not in self._asked and plan is not None and self._offers(plan):
            params = {key: plan[key] for key in self._keys}
            self._study.add_trial(
                optuna.trial.create_trial(state=state, value=ratio, params=params, distributions=self._distributions)
            )
        self._asked[identity] = None

    def _offers(self, plan: Plan) -> bool:
        """Whether a plan is of this catalogue's schedule and libraries."""
        schedule = plan["schedule"] == self._start["schedule"]
        return schedule and all(plan[key] in names for key, names in self._options.items())

    @property
    def size(self) -> int:
        """How many engines there are: some choices leave another without a meaning."""
        counts = {key: len(names) for key, names in self._options.items()}
        if "swiglu_library" in counts:  # quack's product is none of cuBLASLt's
            pair = counts.pop("rank_gate_up_forward") + counts.pop("swiglu_library") - 1
        else:  # the native kernel of attention has no blocks
            pair = counts.pop("attention_block") + counts.pop("attention_kernel") - 1
        return math.prod(counts.values()) * pair


def _search_space(target: Target, start: Plan) -> tuple[Plan, dict[str, tuple[str, ...]]]:
    """Where the search begins, and what it chooses between."""
    hopper = start.with_choice("schedule", "hopper")
    if target.hardware.name in _HOPPER_GPUS and _has_kernels(target, hopper):
        options = {key: tuple(filter(_is_installed, names)) for key, (names, _) in HOPPER.items()}
        for key in ("attention_library", "swiglu_library"):
            hopper = hopper.with_choice(key, options[key][-1])  # the packages are the faster where they are
        return hopper, options
    start = start.with_choice("schedule", "production").with_choice("rope_tables", "fp32")
    options = {key: names for key, (names, _) in SCHEDULE.items() if key != "schedule"}
    if target.hardware.device != "cpu":
        for key, name in WITHOUT_NATIVE.items():
            options[key], start = (name,), start.with_choice(key, name)
    return start, options


def _has_kernels(target: Target, plan: Plan) -> bool:
    try:
        require_schedule(target, plan)
    except UserError:
        return False
    return True


def _is_installed(choice: str) -> bool:
    return choice not in _PACKAGES or importlib.util.find_spec(_PACKAGES[choice]) is not None
