"""Time of the diagonal op against the dense layer it replaces, on this CPU.

    python benchmarks/op_cpu.py [--threads 1] [--dtype float32] [--repeats 20]

Both run in one process with the same threads, one call of each in turn, so that both meet the same machine: frequency,
neighbours, caches. Forward is without autograd; forward+backward computes the gradients of x, weight and bias. Prints a
table and writes benchmarks/results/op_cpu-<cpu>-torch<version>-<dtype>-<threads>t.csv: medians and quartiles in
milliseconds, the ratio dense / diagonal of the medians, and useful GFLOP/s (2 rows K L for each product).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import dst_ops

SHAPES = [  # rows (tokens), in_features, out_features
    (512, 768, 768),
    (2048, 768, 768),
    (2048, 768, 3072),
    (2048, 3072, 768),
    (512, 4096, 4096),
]
SPARSITIES = (0.6, 0.8, 0.9, 0.95)
BANDS = (1, 16)


def quartiles(functions: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """[lower quartile, median, upper quartile] of each function in milliseconds."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, seen in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seen.append((time.perf_counter() - start) * 1e3)
    return [statistics.quantiles(seen, n=4, method="inclusive") for seen in times]


def measure(
    rows: int, n: int, m: int, sparsity: float, band: int, dtype: torch.dtype, repeats: int
) -> dict[str, object]:
    long, short = max(m, n), min(m, n)
    units = max(1, round((1 - sparsity) * long / band))
    offsets = torch.randperm(long // band)[:units].int()
    x, dy = torch.randn(rows, n, dtype=dtype, requires_grad=True), torch.randn(rows, m, dtype=dtype)
    values = torch.randn(units * band, short, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((m, n), (m,)))

    def diagonal() -> Tensor:
        return dst_ops.diagonal_linear(x, values, offsets, bias, out_features=m, in_features=n, band=band)

    def dense() -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def with_gradients(forward: Callable[[], Tensor], parameter: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), (x, parameter, bias), dy)

    with torch.no_grad():
        forward = quartiles([diagonal, dense], repeats)
    both = quartiles([with_gradients(diagonal, values), with_gradients(dense, weight)], repeats)
    result: dict[str, object] = {"rows": rows, "in": n, "out": m, "sparsity": sparsity, "band": band, "K": units * band}
    for name, (ours, theirs), products in (("fwd", forward, 1), ("fwd+bwd", both, 3)):
        for who, q in (("diagonal", ours), ("dense", theirs)):
            result |= {
                f"{name}_{who}_ms": round(q[1], 3),
                f"{name}_{who}_q1": round(q[0], 3),
                f"{name}_{who}_q3": round(q[2], 3),
            }
        result[f"{name}_ratio"] = round(theirs[1] / ours[1], 2)
        result[f"{name}_gflops"] = round(products * 2 * rows * units * band * short / ours[1] / 1e6, 1)
    return result


def line(r: dict[str, object]) -> str:
    cells = [f"{r['rows']:>5} {r['in']:>5}->{r['out']:<5} {r['sparsity']:<5} {r['band']:>4}"]
    for name in ("fwd", "fwd+bwd"):
        for who in ("diagonal", "dense"):
            spread = f"[{r[f'{name}_{who}_q1']:.2f}, {r[f'{name}_{who}_q3']:.2f}]"
            cells.append(f"{r[f'{name}_{who}_ms']:>8.2f} {spread:<17}")
        cells.append(f"x{r[f'{name}_ratio']:<5} {r[f'{name}_gflops']:>6} GFLOP/s |")
    return " ".join(cells)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return re.sub(r"[^A-Za-z0-9]+", "_", found.group(1) if found else platform.machine()).strip("_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if not dst_ops.load():
        raise SystemExit("op_cpu: the fused kernels could not be built; there is nothing to measure")
    print(
        f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, {args.dtype}, load {os.getloadavg()[0]:.1f}"
    )
    print(dst_ops.backend_report())
    print(
        f"{'rows':>5} {'in->out':<12} spars. band | forward: diagonal, dense, ms [quartiles]; ratio | forward+backward"
    )
    results = []
    for rows, n, m in SHAPES:
        for sparsity in SPARSITIES:
            for band in BANDS:
                results.append(measure(rows, n, m, sparsity, band, getattr(torch, args.dtype), args.repeats))
                print(line(results[-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"op_cpu-{cpu_name()}-torch{torch.__version__}-{args.dtype}-{args.threads}t.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    print(f"written: {path}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
