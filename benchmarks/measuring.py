"""What the benchmarks share: calls that take turns, freed memory that is kept, the machine's name, results as csv."""

from __future__ import annotations

import csv
import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import dst_ops
from dst_ops.build import instruction_set

RESULTS = Path(__file__).parent / "results"


class Times(NamedTuple):
    """Milliseconds on a CPU, microseconds on a GPU."""

    q1: float
    median: float
    q3: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.q1:.3f}, {self.q3:.3f}]"


def quartiles(times: Sequence[float]) -> Times:
    return Times(*statistics.quantiles(times, n=4, method="inclusive"))


def take_turns(functions: Sequence[Callable[[], object]], repeats: int, in_a_row: int = 4) -> list[Times]:
    """Times each function at least `repeats` times, a few calls in a row of each in turn.

    In turn, so that all meet the same machine: its frequency, its other work. A few in a row after one that does not
    count, since a call finds caches and threads as the call of another contestant left them: a layer in a model comes
    after others of its kind.
    """
    seen: list[list[float]] = [[] for _ in functions]
    while any(len(times) < repeats for times in seen):
        for function, times in zip(functions, seen, strict=True):
            function()
            for _ in range(min(in_a_row, repeats)):
                start = time.perf_counter()
                function()
                times.append((time.perf_counter() - start) * 1e3)
    return [quartiles(times) for times in seen]


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, instead of giving it back and taking fresh pages for the next tensor.

    The kernel zeroes a fresh page when it is first written. For an output of some MiB that costs as much as a small
    sparse product, so that a benchmark would measure the kernel's work, too. False where the library has no mallopt,
    which is glibc's, or refuses.
    """
    trim_threshold, mmap_threshold, never = -1, -3, -1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(mmap_threshold, 2**30)) and bool(library.mallopt(trim_threshold, never))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def file_stem(name: str, processor: str | None = None) -> str:
    """Results of different machines and versions lie beside each other: <name>-<processor, or CPU>-torch<version>."""
    processor = re.sub(r"[^A-Za-z0-9]+", "_", processor or cpu_name()).strip("_")
    return f"{name}-{processor}-torch{torch.__version__}"


def start(threads: int, fresh_pages: bool) -> str:
    """Prepares this process and describes it and its machine in one line; ends it if the op has no kernels here."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kept = not fresh_pages and keep_freed_memory()
    if not dst_ops.load():
        raise SystemExit("the fused kernels could not be built; there is nothing to measure")
    instructions = next(e.reason for e in dst_ops.backend_report().entries if e.device == "cpu").partition(",")[0]
    pages = "freed memory is kept" if kept else "fresh pages for large tensors"
    return f"{cpu_name()}, {threads} threads, torch {torch.__version__}, {instructions}, {pages}, load {load()}"


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def write_results(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes results/<stem>.csv. Rows of other numbers of threads that it holds already stay in it.

    The stem names the op's kernels, too: virtual machines hide which of its generations a processor is.
    """
    path = RESULTS / f"{file_stem(name, f'{cpu_name()} {instruction_set()}')}.csv"
    kept: list[Mapping[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["threads"] != str(rows[0]["threads"])]
    write_csv(path, [*kept, *rows], list(rows[0]))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {os.path.relpath(path)}")
