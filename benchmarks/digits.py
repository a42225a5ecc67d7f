"""Accuracy of the digits jobs against the same jobs dense: `python benchmarks/digits.py [--jobs vit mlp] [--seeds 0 1 2]`.

Runs jobs/<name>_digits.yaml and jobs/<name>_digits_dense.yaml through the launcher, one after the other, prints mean and
standard deviation, and writes results/digits-<cpu>-torch<version>.csv. About two minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip().replace(" ", "_")
    return platform.machine()


def run(job: str, seed: int, ranks: int, folder: str) -> dict[str, object]:
    """One training; accuracy in percent, seconds of wall clock with start-up."""
    started = time.perf_counter()
    name = f"{job}-{seed}"
    command = ["deepspeed", "-q", "--num_gpus", str(ranks), str(ROOT / "launch/train.py"), "--job", str(ROOT / f"jobs/{job}.yaml")]
    overrides = ["--set", f"seed={seed}", "--set", f"run_root={folder}", "--set", f"name={name}"]
    output = subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    accuracy = float(output.rpartition("accuracy ")[2].partition("%")[0])
    environment = json.loads((Path(folder) / name / "env.json").read_text())
    revision = environment["git"]["revision"][:12] + ("+changes" if environment["git"]["dirty"] else "")
    seconds = round(time.perf_counter() - started)
    return {"job": job, "seed": seed, "ranks": ranks, "accuracy": accuracy, "seconds": seconds, "revision": revision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=["vit", "mlp"], choices=["vit", "mlp"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.jobs:
            for job in (f"{name}_digits", f"{name}_digits_dense"):
                for seed in args.seeds:
                    rows.append(run(job, seed, args.ranks, folder))
                    print(rows[-1], flush=True)
    for job in dict.fromkeys(row["job"] for row in rows):
        values = [float(str(row["accuracy"])) for row in rows if row["job"] == job]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{job}: {statistics.mean(values):.2f} +- {spread:.2f} % (n = {len(values)})")
    path = ROOT / f"benchmarks/results/digits-{cpu_name()}-torch{torch.__version__}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
