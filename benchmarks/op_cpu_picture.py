"""Draws how often dense takes as long as the diagonal op, from 0 to 99 % sparsity: 2048 tokens, 768 -> 3072, fp32.

    python benchmarks/op_cpu_picture.py [docs/op_cpu.png] [--threads 2] [--repeats 21] [--quick]

Measured as by op_cpu.py. Writes the picture and results/op_cpu_sparsity-<cpu>_<kernels>-torch<version>.csv; `--quick` measures
three sparsities with two calls and writes the picture only.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from contestants import Case, against_dense
from limits import measure
from matplotlib.axes import Axes
from measuring import cpu_name, load, start, write_results
from op_cpu import BOTH, FORWARD, Result, run

SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
BANDS = (1, 16)
TOKENS, N, M = 2048, 768, 3072


def absent(result: Result) -> float:
    """The sparsity itself: that of the case, rounded to whole bands."""
    return 1 - result.case.entries / (result.case.m * result.case.n)


def speed_up(result: Result) -> float:
    return result.to_dense or math.nan


def break_even(line: list[Result]) -> float | None:
    """The sparsity from which the op is faster than dense, on a straight line between two points of the picture."""
    for left, right in pairwise(line):
        if speed_up(left) < 1 <= speed_up(right):
            share = math.log(1 / speed_up(left)) / math.log(speed_up(right) / speed_up(left))
            return 1 - (1 - absent(left)) ** (1 - share) * (1 - absent(right)) ** share
    return None


def draw(axes: Axes, results: list[Result], work: str) -> None:
    """Both axes are logarithmic, the lower one in 1 / density, so that the ideal is a straight line."""
    for band, colour in zip(BANDS, ("tab:blue", "tab:orange"), strict=True):
        line = [r for r in results if r.case.band == band and r.work == work and r.contestant.name == "ours"]
        ratios, even = [speed_up(r) for r in line], break_even(line)
        never = ", dense never wins here" if min(ratios) >= 1 else ""
        density = [1 / (1 - absent(r)) for r in line]
        axes.plot(density, ratios, "o-", color=colour, markersize=4, label=f"band {band}{never}")
        if even is not None:
            place = (8, -14 if band == BANDS[0] else -28)
            text = f"even at {100 * even:.0f} %"
            axes.annotate(text, (1 / (1 - even), 1), place, textcoords="offset points", color=colour)
    ideal = [1 / (1 - sparsity) for sparsity in SPARSITIES]
    axes.plot(ideal, ideal, color="grey", linewidth=0.8, label="1 / density")
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", ylim=(0.4, 120), title=work.replace("+", " + "), xlabel="sparsity, %")
    axes.set_xticks(ideal, [f"{100 * sparsity:.0f}" for sparsity in SPARSITIES])
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", default=Path(__file__).parents[1] / "docs" / "op_cpu.png")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(start(args.threads, fresh_pages=False))
    limits = measure(args.threads)
    results: list[Result] = []
    for sparsity in SPARSITIES[::4] if args.quick else SPARSITIES:
        for band in BANDS:
            case = Case(TOKENS, N, M, sparsity, band)
            contestants = against_dense(case)
            for work in (FORWARD, BOTH):
                results += run(case, contestants, work, 2 if args.quick else args.repeats, limits)
                ours = results[-2]
                print(
                    f"{100 * sparsity:.0f} %, band {band:>2}, {work:<16} {ours.times} ms, x{ours.to_dense:.2f}",
                    flush=True,
                )
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axes, work in zip(panels, (FORWARD, BOTH), strict=True):
        draw(axes, results, work)
    panels[0].set_ylabel("speed-up over dense")
    figure.suptitle(f"{TOKENS} tokens, {N} → {M}, fp32, {args.threads} threads, {cpu_name()}", fontsize="medium")
    figure.savefig(args.picture, dpi=110)
    print(f"written: {args.picture}; load {load()} at the end")
    if not args.quick:
        write_results("op_cpu_sparsity", [r.row("sparsity") for r in results])


if __name__ == "__main__":
    main()
