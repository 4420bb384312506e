"""How long collecting and aligning take for a target, each as ``forgetrain`` runs them, from nothing.

python bench/align.py                          # targets/nano-cpu.toml, three times
python bench/align.py targets/nano-cpu.toml --repeats 1 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def timed(*arguments: str) -> tuple[float, dict[str, Any]]:
    """Seconds of a whole command, and the JSON object that it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "forgetrain", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])


def once(target: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as runs:
        collect, _ = timed("collect", target, "--runs", runs)
        align, result = timed("align", target, "--runs", runs)
    if not result["passed"]:
        raise SystemExit(f"{target} did not align: {result['divergence']}")
    return {"collect": collect, "align": align, "attempts": len(result["attempts"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="targets/nano-cpu.toml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    if options.repeats < 1 or not Path(options.target).is_file():
        parser.error("name a target file, and at least one repeat")
    rows = [once(options.target) for _ in range(options.repeats)]
    result = {"target": options.target, "repeats": options.repeats}
    for name in rows[0]:
        values = [row[name] for row in rows]
        result[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
        unit = "attempts" if name == "attempts" else "seconds"
        print(f"{name:<9} median {statistics.median(values):6.1f}   {min(values):.1f} to {max(values):.1f} {unit}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
