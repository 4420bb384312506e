"""The table that ``forgetrain train --dry-run`` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from forgetrain.spec.estimate import in_units


def plan_table(plan: dict[str, Any]) -> Table:
    """The checks that passed, then what the run would do."""
    out = Table(title=f"{plan['target']}: every check passed, nothing was trained", show_header=False)
    out.add_column("what")
    out.add_column("value")
    out.add_row("engine", f"{plan['engine']['name']} ({plan['engine']['status']})")
    for check in plan["checks"]:
        out.add_row(check["name"], check["found"])
    out.add_section()
    out.add_row("steps", f"{plan['first_step']} to {plan['steps']}")
    for stage in plan["stages"]:
        batch, length = stage["shape"]
        name = f"  {stage['name']}" if stage["name"] else "  shape"
        out.add_row(name, f"steps {stage['first']} to {stage['last']}: {batch} x {length} tokens")
    out.add_row("tokens", f"{plan['tokens']:,}, {plan['passes']:.2f} passes over the data")
    out.add_row("learning rate", ", ".join(f"step {point['step']}: {point['lr']:.3g}" for point in plan["lr"]))
    size = in_units(plan["checkpoint_bytes"])
    out.add_row("checkpoints", f"{plan['checkpoints']} of {size}, at most {plan['most_checkpoints_at_once']} at once")
    out.add_row("evaluations", str(plan["evaluations"]))
    out.add_row("expected time", _time(plan))
    return out


def _time(plan: dict[str, Any]) -> str:
    if plan["seconds"] is None:
        return "not known: nobody has measured this engine here"
    hours, rest = divmod(round(plan["seconds"]), 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}"
    return f"{clock} in steps, at {plan['tokens_per_second']:,.0f} tokens/s ({plan['measured_in']})"
