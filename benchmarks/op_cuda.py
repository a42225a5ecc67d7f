"""Speed of the diagonal op on this GPU, beside the dense layer that it replaces and the other ways to multiply by its weight.

    PYTHONPATH=ops:. python3 benchmarks/op_cuda.py [--seconds 420]

Nothing needs to be installed but torch, nvcc and ninja. Ours takes the kernels that calls take, which are named: by the table
of `python -m dst_ops.tune` if there is one, else by the model. Printed are medians and [quartiles] in microseconds, how often
dense takes as long, and what a call achieves: GB/s of x, y and weight (with a backward pass also of their gradients) and their
share of what a copy reaches, which is the share of the memory floor; useful TFLOP/s (2 * tokens * present weights for each
product, of which forward + backward has three) and their share of what a large product reaches in that dtype.

- Ours, dense: calls captured in a CUDA graph, which is replayed ("graph"). The others can't be captured throughout: they are
  launched while the GPU is kept busy, and it goes through them without waiting for Python ("events"); where it waits all the
  same, the line says so.
- Each call finds its tensors in memory, not in the second-level cache: sets of tensors take turns, and together are twice as
  large as the cache.
- fp32 is without TF32, but for what torch's kernel for BSR does.
- Each contestant is compared with the dense product before it is timed; a wrong one is not timed. What this torch refuses is
  listed as n/a, with the reason.
- CSR: torch derives its gradients, or the same products are written by hand. 2:4: another pattern of half the weights.

What --seconds leave no time for is named at the end. Writes results/op_cuda-<GPU>-torch<version>.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from contestants_cuda import BOTH, NAMES, Contestant
from measuring import RESULTS, file_stem, quartiles, write_csv
from plan_cuda import Aim, Job, Limits, Result, aims, plan

import dst_ops
from dst_ops import routes
from dst_ops.tune import Clock

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, LookupError, AssertionError)


def measure_limits(clock: Clock, device: torch.device, count: int = 2**28, side: int = 8192) -> Limits:
    """Of count numbers of fp32 read and written, copied or by a kernel, and of products of matrices of side x side."""
    source, target = (torch.ones(count, device=device) for _ in range(2))
    passes = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    bandwidth = max(2 * source.nbytes / clock.time([one]).median / 1e3 for one in passes)
    tflops = {}
    for dtype in NAMES:
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        tflops[dtype] = 2 * side**3 / clock.time([lambda a=a, b=b: a @ b]).median / 1e6  # type: ignore[misc]
    return Limits(bandwidth, tflops)


def run(job: Job, clock: Clock, device: torch.device, cache: int) -> list[Result]:
    """All passes. cache: bytes of the second-level cache."""
    results: list[Result] = []
    refusal = ""
    try:
        contestant = job.contestant(job.case, job.dtype, device, cache)
        for work in job.passes:
            results.append(timed(job, contestant, work, clock))
    except REFUSALS as error:
        refusal = " ".join(str(error).split())[:200] or type(error).__name__
    if refusal and device.type == "cuda":
        torch.cuda.synchronize()  # fails if the device is lost, and then nothing more can be measured
    left = job.passes[len(results) :] if refusal else ()
    return results + [Result(job.part, job.case, job.dtype, job.contestant.name, work, note=refusal) for work in left]


def timed(job: Job, contestant: Contestant, work: str, clock: Clock) -> Result:
    error = contestant.error(work)
    if not error <= contestant.tolerance:
        note = f"WRONG: differs from the dense product by {error:.2g} of the largest number"
        return Result(job.part, job.case, job.dtype, contestant.name, work, note=note)
    with torch.set_grad_enabled(work == BOTH):
        timing = clock.time(contestant.calls(work), capture=contestant.captured)
    return Result(
        job.part,
        job.case,
        job.dtype,
        contestant.name,
        work,
        quartiles(timing.samples),
        contestant.kernels(work),
        timing.method,
        contestant.entries,
        contestant.weight_bytes,
    )


class Table:
    """The results so far, printed as they come."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.results = limits, list[Result]()
        self.dense: dict[tuple[object, ...], float] = {}
        self.heading = ""

    def add(self, result: Result) -> None:
        self.results.append(result)
        if result.contestant == "dense" and result.times is not None:
            self.dense[self._layer(result)] = result.times.median
        heading = f"{result.case.tokens} tokens, {result.case.n} -> {result.case.m}"
        if heading != self.heading:
            print(f"\n{heading}")
        self.heading = heading
        print(self.line(result), flush=True)

    def line(self, result: Result) -> str:
        row = result.row(self.limits, self.to_dense(result))
        case = result.case
        level = f"{100 * case.sparsity:.0f} %, band {case.band}, K {case.diagonals}" if case.sparsity else ""
        name = f"{result.contestant} {row['dtype']}{f' ({result.kernels})' if result.kernels else ''}"
        start = f"  {level:<24}{name:<46}{result.work:<18}"
        if result.times is None:
            return f"{start}n/a: {result.note}"
        t, ratio = result.times, row["speedup_over_dense"]
        shares = [100 * float(str(row[column])) for column in ("share_of_memory_floor", "share_of_matrix")]
        return (
            f"{start}{f'{t.median:.1f} [{t.q1:.1f}, {t.q3:.1f}] us':<34}{f'x{float(str(ratio)):.2f}' if ratio else '':<8}"
            f"{row['gb_s']:>8} GB/s {shares[0]:>4.0f} %{row['tflops']:>9} TFLOP/s {shares[1]:>4.0f} %  {result.method}"
        )

    def to_dense(self, result: Result) -> float | None:
        """How often dense takes as long; not for GELU, which dense is timed without."""
        dense = self.dense.get(self._layer(result)) if result.part != "gelu" else None
        return dense / result.times.median if dense is not None and result.times is not None else None

    def rows(self) -> list[dict[str, object]]:
        """Of the csv; none without results."""
        rows = [result.row(self.limits, self.to_dense(result)) for result in self.results]
        if not rows:
            return []
        common = dict.fromkeys(rows[0], "")
        copy = {**common, "part": "limits", "contestant": "copy", "gb_s": f"{self.limits.bandwidth:.1f}"}
        products = [
            {**common, "part": "limits", "contestant": "product", "dtype": NAMES[dtype], "tflops": f"{tflops:.2f}"}
            for dtype, tflops in self.limits.tflops.items()
        ]
        return [*rows, copy, *products]

    @staticmethod
    def _layer(result: Result) -> tuple[object, ...]:
        return (result.case.tokens, result.case.n, result.case.m, result.dtype, result.work)


def measure(
    jobs: list[Job], table: Table, clock: Clock, device: torch.device, cache: int, deadline: float
) -> Iterator[Job]:
    """Fills the table and gives the jobs that were left out. deadline: of time.monotonic()."""
    for job in jobs:
        if job.needed or time.monotonic() < deadline:
            for result in run(job, clock, device, cache):
                table.add(result)
        else:
            yield job


def report(gpu: str, table: Table, skipped: list[Job]) -> None:
    print()
    if rows := table.rows():
        write_csv(RESULTS / f"{file_stem('op_cuda', gpu)}.csv", rows, list(rows[0]))
    levels: dict[str, list[str]] = {}
    for job in skipped:
        layer = f"{job.case.tokens} tokens, {job.case.n} -> {job.case.m}, {job.contestant.name} {NAMES[job.dtype]}"
        levels.setdefault(layer, []).append(f"{100 * job.case.sparsity:.0f} % band {job.case.band}")
    for layer, some in levels.items():
        print(f"skipped for lack of time: {layer}: {', '.join(some)}")
    for aim in aims(table.results, table.limits):
        show(aim)


def show(aim: Aim) -> None:
    print(f"{aim.verdict:<13}{aim.text} (at least {aim.least:g})")
    for label, figure in aim.measured:
        print(f"{'':<13}  {label}: {'n/a' if figure is None else f'{figure:.2f}'}")


def start() -> tuple[str, torch.device, int]:
    """Name of the GPU, device, bytes of its second-level cache; ends the process where there is nothing to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device to measure on")
    if not dst_ops.load("cuda"):
        raise SystemExit("the CUDA kernels could not be built; there is nothing to measure")
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties()
    path = routes.table_path(properties.name)
    kernels = f"kernels by {path}" if path.exists() else "kernels by the model, not measured (python -m dst_ops.tune)"
    print(f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {kernels}", flush=True)
    return properties.name, torch.device("cuda", torch.cuda.current_device()), properties.L2_cache_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420.0, help="no optional work is begun after so many")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    gpu, device, cache = start()
    clock = Clock()
    limits = measure_limits(clock, device)
    products = ", ".join(f"{NAMES[dtype]} {tflops:.0f} TFLOP/s" for dtype, tflops in limits.tflops.items())
    print(f"limits: a copy {limits.bandwidth:.0f} GB/s, a product of 8192 x 8192 matrices {products}", flush=True)
    table = Table(limits)
    skipped: list[Job] = []
    try:
        skipped.extend(measure(plan(), table, clock, device, cache, deadline))
    finally:  # also of what a run has that ends early
        report(gpu, table, skipped)
    wrong = [result for result in table.results if result.note.startswith("WRONG")]
    if wrong:
        sys.exit(f"{len(wrong)} results are wrong, see above")


if __name__ == "__main__":
    main()
