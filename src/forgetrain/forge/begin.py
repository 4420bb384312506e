"""The loop on a prepared run, with ledger, judge and profiler.

with open_loop(target, Path("runs")) as loop:
    loop.run()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from forgetrain.engine.plan import Plan
from forgetrain.forge.optimise import Loop
from forgetrain.forge.profile import profile_engine
from forgetrain.forge.proposers.base import Proposer
from forgetrain.forge.proposers.catalogue import Catalogue
from forgetrain.judge.bound import least_step_seconds
from forgetrain.judge.cluster import Cluster
from forgetrain.judge.ledger import Ledger
from forgetrain.judge.runner import Effort, Judge
from forgetrain.spec.target import Target


@contextmanager
def open_loop(
    target: Target,
    runs: Path,
    proposer: Proposer | None = None,
    *,
    say: Callable[[str], None],
    allow_unsandboxed: bool = False,
    effort: Effort | None = None,
    gates: Sequence[str] | None = None,
    on_cluster: bool = False,
) -> Iterator[Loop]:
    """``runs/<target>`` is collected, aligned and has data. Without a proposer the catalogue writes; the rest is
    ``Loop``'s and ``Judge``'s. ``on_cluster``: candidates are judged on a Ray cluster's nodes."""
    run = runs / target.name
    catalogue = Catalogue(target, Plan.read(run / "engine" / "plan.toml"), seed=target.recipe.seed)
    floor = least_step_seconds(target, say)
    options: dict[str, Any] = {"data": run / "data", "roofline_seconds": floor, "effort": effort or Effort(keep=True)}
    with ExitStack() as opened:
        ledger = opened.enter_context(Ledger(runs / "ledger"))
        cluster = opened.enter_context(Cluster(target, say=say, **options)) if on_cluster else None
        judge = opened.enter_context(Judge(target, **options))
        yield Loop(
            *(target, runs, ledger, judge, proposer or catalogue, catalogue),
            say=say,
            allow_unsandboxed=allow_unsandboxed,
            profiler=partial(profile_engine, judge),
            gates=gates,
            cluster=cluster,
        )
