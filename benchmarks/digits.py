"""Accuracy of the digits jobs against the same jobs dense: `python benchmarks/digits.py vit|mlp [--seeds 0 1 2]`.

Runs the variants below through the launcher, one after the other, prints mean and standard deviation, and writes
results/digits_<name>-<cpu>-torch<version>.csv. About two minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from measuring import file_stem

ROOT = Path(__file__).parents[1]

# The dense ViT learns better at half the rate: it is shown at its best, too.
VARIANTS = {
    "vit": [("vit_digits", ""), ("vit_digits_dense", ""), ("vit_digits_dense", "optimizer.lr=1e-3")],
    "mlp": [("mlp_digits", ""), ("mlp_digits_dense", "")],
}


def run(job: str, change: str, seed: int, ranks: int, folder: str) -> dict[str, str]:
    """One training; accuracy in percent, seconds of wall clock with start-up."""
    started = time.perf_counter()
    name = f"{job}-{change or 'same'}-{seed}".replace("=", "")
    command = [
        "deepspeed",
        "-q",
        "--num_gpus",
        str(ranks),
        str(ROOT / "launch/train.py"),
        "--job",
        str(ROOT / f"jobs/{job}.yaml"),
    ]
    for text in (f"seed={seed}", f"run_root={folder}", f"name={name}", *change.split()):
        command += ["--set", text]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    git = json.loads((Path(folder) / name / "env.json").read_text())["git"]
    return {
        "job": job,
        "change": change,
        "seed": str(seed),
        "ranks": str(ranks),
        "accuracy": output.rpartition("accuracy ")[2].partition("%")[0],
        "seconds": f"{time.perf_counter() - started:.0f}",
        "revision": git["revision"][:12] + ("+changes" if git["dirty"] else ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for job, change in VARIANTS[args.name]:
            for seed in args.seeds:
                rows.append(run(job, change, seed, args.ranks, folder))
                print(rows[-1], flush=True)
    for job, change in VARIANTS[args.name]:
        values = [float(row["accuracy"]) for row in rows if (row["job"], row["change"]) == (job, change)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{job} {change}: {statistics.mean(values):.2f} +- {spread:.2f} % (n = {len(values)})")
    path = ROOT / f"benchmarks/results/{file_stem(f'digits_{args.name}')}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
