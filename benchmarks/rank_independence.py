"""How far a topology depends on the number of ranks: `python benchmarks/rank_independence.py`.

Runs jobs/studies/ranks.yaml (what is missing of it) and compares, update by update, the units that are active on 2 and 4 ranks
with those on 1 rank, of the same method and seed: the mean over layers of the share that both have. With `exact` the signal
is the same function of the batch, and what remains is rounding, which training amplifies; with `local` it is not.
Writes results/ranks/overlap.csv beside the study's own files.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path

from dst_train.study import run_study
from dst_train.study.grid import Grid, Run, build

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "jobs/studies/ranks.yaml"
RESULTS = ROOT / "benchmarks/results/ranks"

Updates = dict[int, dict[str, set[int]]]


def active_units(run: Run) -> Updates:
    """By step of an update and layer."""
    found: Updates = {}
    for line in (run.directory / "topology.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], {})[entry["layer"]] = set(entry["active"])
    return found


def overlap(one: dict[str, set[int]], other: dict[str, set[int]]) -> float:
    """Mean over layers of the share of active units that are active in both."""
    return statistics.mean(len(one[name] & other[name]) / len(one[name]) for name in one)


def rows(grid: Grid) -> list[dict[str, object]]:
    found = []
    for method in grid.study.axes["method"]:
        for number in grid.study.axes["number"]:
            for run, single in zip(grid.at((number, method)), grid.at(("1", method)), strict=True):
                ours, theirs = active_units(run), active_units(single)
                for step in ours:
                    share = f"{overlap(theirs[step], ours[step]):.4f}"
                    found.append(
                        {"method": method, "ranks": number, "seed": run.job.seed, "step": step, "overlap": share}
                    )
    return found


def main() -> int:
    code = run_study(STUDY, out=RESULTS)
    if code:
        return code
    found = rows(build(STUDY))
    with (RESULTS / "overlap.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    steps = sorted({int(str(row["step"])) for row in found})
    for method, ranks in sorted({(str(row["method"]), str(row["ranks"])) for row in found}):
        shares = []
        for step in (steps[0], steps[len(steps) // 2], steps[-1]):
            at = [
                float(str(r["overlap"])) for r in found if (r["method"], r["ranks"], r["step"]) == (method, ranks, step)
            ]
            shares.append(f"step {step}: {statistics.mean(at):7.2%}")
        print(f"{method:<16} {ranks} ranks  {'  '.join(shares)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
