"""Speed of the diagonal op on this CPU, beside the dense layer that it replaces and the other ways to multiply by its
weight.

    python benchmarks/op_cpu.py [--threads 1] [--repeats 21] [--quick]

All contestants run in one process with the same threads, a few calls of each in turn. Forward is without autograd; forward
+ backward computes the gradients of x, weight and bias. Printed are medians and [quartiles] in milliseconds, how often
dense takes as long, useful GFLOP/s (2 * tokens * present weights for each product, of which forward + backward has
three), and their share of the fp32 multiply-adds that this machine does on registers (limits.cpp). K is the number of
diagonals; bands are whole, so that K / P is not always exactly the density asked for.

- Dense: `F.linear`. CSR and BSR: torch's sparse layouts. CSR's backward computes the whole dense gradient of the
  weight; BSR has no backward on the CPU, so that its cells are empty. Its blocks of 16 x 16 fit bands of 16, half
  filled; single diagonals touch nearly every block, and the table shows what that costs.
- Rolls: `y += values[k] * roll(x, -offset)`. Gather/scatter: 64 diagonals at once, as in the public code of the
  DynaDiag paper. Both are so slow that three calls must do.
- bf16 and fp16: dense fp16, and bf16 without AVX-512, without backward, for which torch 2.14 takes seconds a call on a CPU
  that has no such arithmetic.
- A few tokens: ten times the calls, as these are short.
- Tokens side by side: x and dy are transposed, 512 tokens of each of 8 images in turn, as in the token mixing of Mixer-S/16.
- Scores: `diagonal_scores` against `dy.t() @ x`, the dense product inside it.

Memory that is freed stays in the process, for all contestants alike: glibc would give large blocks back, take fresh
pages for each output, and make zeroing them cost as much as a small sparse product. `--fresh-pages` measures without
that.

Writes results/op_cpu-<cpu>_<kernels>-torch<version>.csv; `--quick` measures two layers of each part with two calls, and only
prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from contestants import Case, Contestant, against_dense, alternatives, dtypes, scores, transposed
from limits import Limits, measure
from measuring import Times, load, start, take_turns, write_results

SHAPES = [  # tokens, in_features, out_features
    (512, 768, 768),
    (2048, 768, 768),
    (512, 768, 3072),
    (2048, 768, 3072),
    (512, 3072, 768),
    (2048, 3072, 768),
    (512, 4096, 4096),
]
LEVELS = [(0.9, 1), (0.9, 16), (0.9, 32), (0.95, 1), (0.95, 16), (0.6, 1), (0.6, 16)]  # sparsity, band
FORWARD, BOTH = "forward", "forward+backward"
SLOW_REPEATS = 3
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Part(NamedTuple):
    name: str
    title: str
    cases: list[Case]
    contestants: Callable[[Case], list[Contestant]]
    passes: tuple[str, ...]


PARTS = [
    Part(
        "dense",
        "Diagonal against dense, fp32",
        [Case(*shape, *level) for shape in SHAPES for level in LEVELS],
        against_dense,
        (FORWARD, BOTH),
    ),
    Part(
        "alternatives",
        "Other ways to compute the same, fp32",
        [Case(*shape, 0.9, band) for shape in [(512, 768, 768), (512, 768, 3072)] for band in (1, 16)],
        alternatives,
        (FORWARD, BOTH),
    ),
    Part(
        "few tokens",
        "A few tokens, fp32",
        [Case(tokens, n, n, 0.9, 1) for n in (768, 4096) for tokens in (1, 16)],
        against_dense,
        (FORWARD,),
    ),
    Part(
        "dtypes",
        "bf16 and fp16",
        [Case(*shape, 0.9, band) for shape in [(2048, 768, 3072), (2048, 3072, 768)] for band in (1, 16)],
        dtypes,
        (FORWARD, BOTH),
    ),
    Part(
        "transposed",
        "Tokens side by side, fp32",
        [Case(4096, n, m, 0.9, band) for n, m in [(196, 256), (256, 196)] for band in (1, 4)],
        transposed,
        (FORWARD, BOTH),
    ),
    Part(
        "scores",
        "Growth scores of all candidates against the dense gradient, fp32",
        [Case(*shape, 0.0, 1) for shape in [(2048, 768, 768), (2048, 768, 3072), (2048, 3072, 768), (512, 4096, 4096)]],
        scores,
        ("scores",),
    ),
]


class Result(NamedTuple):
    case: Case
    contestant: Contestant
    work: str
    times: Times
    to_dense: float | None  # how often dense takes as long, in the same dtype
    gflops: float
    share: float  # of the machine's register limit

    @property
    def label(self) -> str:
        dtype = DTYPES[self.contestant.dtype]
        return self.contestant.name if dtype == "fp32" else f"{self.contestant.name} {dtype}"

    def row(self, part: str) -> dict[str, object]:
        case, times = self.case, self.times
        return {
            "part": part,
            "dtype": DTYPES[self.contestant.dtype],
            "threads": torch.get_num_threads(),
            "tokens": case.tokens,
            "in": case.n,
            "out": case.m,
            "sparsity": case.sparsity,
            "band": case.band,
            "K": case.diagonals,
            "contestant": self.contestant.name,
            "pass": self.work,
            "median_ms": f"{times.median:.4f}",
            "q1_ms": f"{times.q1:.4f}",
            "q3_ms": f"{times.q3:.4f}",
            "ratio_to_dense": "" if self.to_dense is None else f"{self.to_dense:.3f}",
            "gflops": f"{self.gflops:.1f}",
            "share_of_register_limit": f"{self.share:.3f}",
        }


def run(case: Case, contestants: list[Contestant], work: str, repeats: int, limits: Limits) -> list[Result]:
    """One pass of all contestants that have it."""
    calls = {c: c.both if work == BOTH else c.forward for c in contestants}
    repeats *= 10 if case.tokens <= 16 else 1
    times: dict[Contestant, Times] = {}
    for slow in (False, True):
        some = {c: call for c, call in calls.items() if c.slow == slow and call is not None}
        with torch.set_grad_enabled(work == BOTH):
            measured = take_turns(list(some.values()), min(repeats, SLOW_REPEATS) if slow else repeats)
        times |= dict(zip(some, measured, strict=True))
    dense = {c.dtype: times[c].median for c in times if c.name == "dense"}
    results = []
    for c, seen in times.items():
        gflops = (3 if work == BOTH else 1) * 2 * case.tokens * c.entries / seen.median / 1e6
        to_dense = dense[c.dtype] / seen.median if c.dtype in dense else None
        results.append(Result(case, c, work, seen, to_dense, gflops, gflops / limits.registers))
    return results


def header(part: Part) -> str:
    columns = [f"{work + ', ms':<30}{'speed-up':>9}{'GFLOP/s':>9}{'of limit':>9}" for work in part.passes]
    return f"\n{part.title}\n{'':<40}" + " | ".join(columns)


def show(results: list[Result], passes: tuple[str, ...]) -> None:
    """A line for each contestant, its passes beside each other."""
    case = results[0].case
    what = f"{100 * case.sparsity:.0f} %, band {case.band}, K {case.diagonals}"
    cells: dict[str, dict[str, str]] = {}
    for r in results:
        ratio = "" if r.to_dense is None else f"x{r.to_dense:.2f}"
        cells.setdefault(r.label, {})[r.work] = f"{r.times!s:<30}{ratio:>9}{r.gflops:>9.1f}{100 * r.share:>7.0f} %"
    for label, by_pass in cells.items():
        print(f"  {what:<22}{label:<16}" + " | ".join(f"{by_pass.get(work, ''):<57}" for work in passes), flush=True)
        what = ""
    ours = {(r.contestant.dtype, r.work): r.times.median for r in results if r.contestant.name == "ours"}
    for dtype in {dtype: None for dtype, _ in ours if dtype != torch.float32}:
        ratios = [f"{work} x{ours[torch.float32, work] / ours[dtype, work]:.2f}" for work in passes]
        print(f"  {'':<22}ours fp32 / ours {DTYPES[dtype]}: {', '.join(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh-pages", action="store_true")
    args = parser.parse_args()
    print(start(args.threads, args.fresh_pages))
    limits = measure(args.threads)
    print(f"limits: {limits.registers:.1f} GFLOP/s on registers, {limits.loads:.1f} with a load for each multiply-add")
    common = {"part": "limits", "dtype": "fp32", "threads": args.threads}
    last_rows = [{**common, "contestant": name, "gflops": f"{gflops:.1f}"} for name, gflops in limits._asdict().items()]
    rows: list[dict[str, object]] = []
    for part in PARTS:
        print(header(part))
        shape = ""
        for case in part.cases[: 2 if args.quick else None]:
            contestants = part.contestants(case)
            repeats = 2 if args.quick else args.repeats
            results = [r for work in part.passes for r in run(case, contestants, work, repeats, limits)]
            if shape != (shape := f"{case.tokens} tokens, {case.n} -> {case.m}"):
                print(shape)
            show(results, part.passes)
            rows += [r.row(part.name) for r in results]
        if not args.quick:  # after each part: a run that is stopped has not been for nothing
            write_results("op_cpu", [*rows, *last_rows])
    print(f"\nload {load()} at the end")


if __name__ == "__main__":
    main()
