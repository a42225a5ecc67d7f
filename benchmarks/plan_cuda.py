"""What op_cuda.py measures, in order, what it makes of the times, and the aims that it holds them against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from contestants import Case
from contestants_cuda import (
    BOTH,
    FORWARD,
    NAMES,
    Bsr,
    Contestant,
    Csr,
    CsrByHand,
    Dense,
    Ours,
    OursThenGelu,
    OursWithGelu,
    TwoFour,
)
from measuring import Times

VIT = 128 * 197  # tokens of ViT-B/16: 128 images, a class token and 14 x 14 patches each
TRAINED = [(VIT, 768, 768), (VIT, 768, 3072), (VIT, 3072, 768), (8192, 4096, 4096)]  # tokens, in_features, out_features
FEW = [(tokens, 4096, 4096) for tokens in (1, 8, 32, 128)]
SHAPES = [*TRAINED, *FEW, *((197, n, m) for _, n, m in TRAINED[:3])]
SPARSITIES, BANDS = (0.9, 0.95, 0.8, 0.98, 0.6), (1, 32, 16, 64)
BF16, FP32 = torch.bfloat16, torch.float32


class Job(NamedTuple):
    """A contestant of one layer. Without the needed jobs no aim can be judged; time may not suffice for the others."""

    part: str
    case: Case
    dtype: torch.dtype
    contestant: type[Contestant]
    passes: tuple[str, ...]
    needed: bool = True


def plan() -> list[Job]:
    """The jobs that aims need come first, dense before whatever is compared with it."""
    first = [(0.9, 1), (0.9, 32)]
    rest = [level for sparsity in SPARSITIES for band in BANDS if (level := (sparsity, band)) not in first]
    gelu = [Case(VIT, 768, 3072, *level) for level in first]
    jobs = [
        *ours(first, BF16),
        *(Job("gelu", case, BF16, kind, (FORWARD, BOTH)) for case in gelu for kind in (OursThenGelu, OursWithGelu)),
        *others(),
        *ours(rest, BF16, needed=False),
        *ours([(0.9, 1), (0.95, 1)], FP32, needed=False),
        *(Job("others", Case(*s, 0.9, 1), dtype, Csr, (FORWARD,), False) for s in FEW for dtype in (BF16, FP32)),
    ]
    ordered: dict[tuple[object, ...], Job] = {}
    for job in jobs:
        tokens, n, m = job.case.tokens, job.case.n, job.case.m
        dense = Job("dense", Case(tokens, n, m, 0.0, 1), job.dtype, Dense, passes(tokens, n, m), job.needed)
        for one in (dense, job):
            ordered.setdefault((one.contestant, one.case, one.dtype), one)
    return list(ordered.values())


def passes(*shape: int) -> tuple[str, ...]:
    return (FORWARD, BOTH) if shape in TRAINED else (FORWARD,)


def ours(levels: list[tuple[float, int]], dtype: torch.dtype, needed: bool = True) -> list[Job]:
    """At each level (sparsity, band), for all shapes."""
    layers = [(shape, level) for shape in SHAPES for level in levels]
    return [Job("ours", Case(*shape, *level), dtype, Ours, passes(*shape), needed) for shape, level in layers]


def others() -> list[Job]:
    """Other ways to multiply by a sparse weight, for training, and ours in fp32 beside those that take no bf16."""
    jobs = []
    for shape in TRAINED:
        case, bands = Case(*shape, 0.9, 1), Case(*shape, 0.9, 32)
        jobs.append(Job("ours", case, FP32, Ours, (FORWARD, BOTH)))
        for dtype in (BF16, FP32):
            jobs.append(Job("others", case, dtype, Csr, (FORWARD, BOTH)))
            jobs.append(Job("others", case, dtype, CsrByHand, (BOTH,)))
            jobs += [Job("others", c, dtype, Bsr, (FORWARD,), False) for c in (case, bands)]
            jobs.append(Job("others", Case(*shape, 0.95, 1), dtype, Csr, (FORWARD, BOTH), False))
        jobs.append(Job("others", Case(*shape, 0.5, 1), BF16, TwoFour, (FORWARD,), False))
    return jobs


class Limits(NamedTuple):
    """As measured on this GPU. bandwidth: GB/s of a copy, read and written. tflops: of a square product, by dtype."""

    bandwidth: float
    tflops: dict[torch.dtype, float]


@dataclass(frozen=True)
class Result:
    """times: microseconds, None where there are none, and then note says why."""

    part: str
    case: Case
    dtype: torch.dtype
    contestant: str
    work: str
    times: Times | None = None
    kernels: str = ""
    method: str = ""
    entries: int = 0
    weight_bytes: int = 0
    note: str = ""

    @property
    def bytes(self) -> int:
        """That must pass the memory: x, y, their gradients and the weight, each as often as a product takes or gives it."""
        c, size = self.case, self.dtype.itemsize
        if self.work == BOTH:
            return c.tokens * (3 * c.n + 2 * c.m) * size + 3 * self.weight_bytes
        return c.tokens * (c.n + c.m) * size + self.weight_bytes

    @property
    def operations(self) -> int:
        """Useful ones."""
        return (3 if self.work == BOTH else 1) * 2 * self.case.tokens * self.entries

    def row(self, limits: Limits, to_dense: float | None) -> dict[str, object]:
        """A line of the csv. to_dense: how often dense takes as long."""
        c = self.case
        row: dict[str, object] = {
            "part": self.part,
            "dtype": NAMES[self.dtype],
            "tokens": c.tokens,
            "in": c.n,
            "out": c.m,
            "sparsity": c.sparsity,
            "band": c.band,
            "K": c.diagonals,
            "contestant": self.contestant,
            "kernels": self.kernels,
            "pass": self.work,
            "method": self.method,
        }
        figures = [""] * len(FIGURES)
        if self.times is not None:
            rate, tflops = self.bytes / self.times.median / 1e3, self.operations / self.times.median / 1e6
            share, of_matrix = rate / limits.bandwidth, tflops / limits.tflops[self.dtype]
            times = [f"{t:.3f}" for t in (self.times.median, self.times.q1, self.times.q3)]
            ratio = "" if to_dense is None else f"{to_dense:.3f}"
            figures = [*times, ratio, f"{rate:.1f}", f"{share:.3f}", f"{tflops:.2f}", f"{of_matrix:.4f}"]
        return {**row, **dict(zip(FIGURES, figures, strict=True)), "note": self.note}


# The share of the bandwidth is that of the memory floor: the time of the bytes at the measured bandwidth / the time.
FIGURES = (
    "median_us",
    "q1_us",
    "q3_us",
    "speedup_over_dense",
    "gb_s",
    "share_of_memory_floor",
    "tflops",
    "share_of_matrix",
)


class Aim(NamedTuple):
    """measured: what was compared, and the figure; None where a part of it has no time."""

    text: str
    least: float
    measured: list[tuple[str, float | None]]

    @property
    def verdict(self) -> str:
        figures = [figure for _, figure in self.measured if figure is not None]
        if any(figure < self.least for figure in figures):
            return "missed"
        return "reached" if figures and len(figures) == len(self.measured) else "not measured"


def aims(results: list[Result], limits: Limits) -> list[Aim]:
    def times(
        name: str, shape: tuple[int, int, int], level: tuple[float, int], dtype: torch.dtype, work: str
    ) -> float | None:
        case = Case(*shape, *level)
        wanted = (name, case, dtype, work)
        found = [r for r in results if (r.contestant, r.case, r.dtype, r.work) == wanted and r.times is not None]
        return found[0].times.median if found and found[0].times is not None else None

    def ratio(slow: Iterable[float | None], quick: float | None) -> float | None:
        known = [t for t in slow if t is not None]
        return min(known) / quick if known and quick is not None else None

    def over_dense(shape: tuple[int, int, int], band: int, work: str) -> tuple[str, float | None]:
        ours = times("ours", shape, (0.9, band), BF16, work)
        return f"{shape[0]} tokens, {work}", ratio([times("dense", shape, (0.0, 1), BF16, work)], ours)

    def over_csr(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[str, float | None]:
        compared = [times(kind.name, shape, (0.9, 1), d, BOTH) for kind in (Csr, CsrByHand) for d in {dtype, FP32}]
        label = f"{shape[0]} tokens, {shape[1]} -> {shape[2]}, {NAMES[dtype]}"
        return label, ratio(compared, times("ours", shape, (0.9, 1), dtype, BOTH))

    def floor(shape: tuple[int, int, int]) -> tuple[str, float | None]:
        case = Case(*shape, 0.9, 32)
        found = [r for r in results if (r.contestant, r.case, r.dtype, r.work) == ("ours", case, BF16, FORWARD)]
        share = [r.bytes / r.times.median / 1e3 / limits.bandwidth for r in found if r.times is not None]
        return f"{shape[1]} -> {shape[2]}", share[0] if share else None

    def gelu(band: int, work: str) -> tuple[str, float | None]:
        after, fused = (
            times(kind.name, (VIT, 768, 3072), (0.9, band), BF16, work) for kind in (OursThenGelu, OursWithGelu)
        )
        return f"band {band}, {work}", ratio([after], fused)

    return [
        Aim(
            "10 x as fast as the quickest CSR, forward + backward, 90 %, band 1",
            10,
            [over_csr(s, d) for s in TRAINED for d in (BF16, FP32)],
        ),
        Aim(
            "2 x as fast as dense, 4096 -> 4096, 90 %, band 32",
            2,
            [over_dense(TRAINED[3], 32, w) for w in (FORWARD, BOTH)],
        ),
        Aim(
            f"Within 25 % of the memory floor, {VIT} tokens, 90 %, band 32, forward",
            0.8,
            [floor(s) for s in TRAINED[:3]],
        ),
        Aim("5 x as fast as dense, 4096 -> 4096, 90 %, band 1", 5, [over_dense(s, 1, FORWARD) for s in FEW[:3]]),
        Aim(
            "GELU inside the kernel not slower than after it, 768 -> 3072, 90 %",
            1,
            [gelu(b, w) for b in (1, 32) for w in (FORWARD, BOTH)],
        ),
    ]
