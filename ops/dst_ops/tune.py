"""`python -m dst_ops.tune`: measure the CUDA kernels on the GPU at hand; from then on calls take the quickest (routes.py).

Every kernel that can take a call computes it several times: products and gradients of the shapes given with --shape
(in_features:out_features; by default a few common ones), for several numbers of tokens, sparsities, bands and dtypes, in
steps that routes.nearest bridges. A kernel that the model puts far behind is left out. When --seconds are over, what is left
is left to the model, the least common sparsities first. float32 is measured without TF32.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dst_ops import build, cuda, routes
from dst_ops.routes import Call, Choice, Point

TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
SHAPES = ((768, 768), (768, 3072), (3072, 768), (4096, 4096))
SPARSITIES = (0.9, 0.95, 0.8, 0.98, 0.6)
BANDS = (1, 8, 16, 32, 64)
DTYPES = ("bfloat16", "float32")
SECONDS = 300.0
HOPELESS = 8.0  # times the quickest kernel's modelled time; the model is not wrong by as much

Run = Callable[[], object]


class Timing(NamedTuple):
    """samples: microseconds of a call, the mean of several calls each. method: how they were taken."""

    samples: list[float]
    method: str

    @property
    def median(self) -> float:
        """Microseconds."""
        return statistics.median(self.samples)


class Clock:
    """Times calls on the current CUDA device, without what Python needs to launch them.

    Calls are captured in a CUDA graph that is replayed. What can't be captured is launched while the device is kept busy, so
    that the device goes through it without waiting for Python.
    """

    def __init__(self, samples: int = 11, sample_us: float = 500.0) -> None:
        """samples: how many are taken, fewer of calls that take long. sample_us: microseconds that one lasts at least."""
        self.samples, self.sample_us = samples, sample_us
        self.stream = torch.cuda.Stream()
        self.failure = ""  # of a capture. No other is tried after it: torch before 2.12 cannot free memory any more

    def time(self, calls: Sequence[Run], *, capture: bool = True) -> Timing:
        """Time of one of the calls, which run one after the other and whose results are kept until the last is done."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            _all(calls)  # the first time kernels are loaded, plans made, memory is allocated
            self.stream.synchronize()
            began = time.perf_counter()
            _all(calls)
            launching = (time.perf_counter() - began) * 1e6
            round_us = self._after_a_wait(calls, launching)[0]
            rounds = max(1, math.ceil(self.sample_us / max(round_us, 1.0)))
            samples = max(3, min(self.samples, int(2e5 / round_us))) if round_us > 0 else self.samples
            rounds = min(rounds, max(1, 512 // len(calls)))
            graph = self._captured(calls, rounds) if capture and not self.failure else None
            if graph is not None:
                return Timing([us / rounds / len(calls) for us in self._replayed(graph, samples)], "graph")
            taken = [self._after_a_wait(calls, launching) for _ in range(samples)]
            method = "events" if all(ahead for _, ahead in taken) else "events, waits for the host"
            return Timing([us / len(calls) for us, _ in taken], method)

    def _after_a_wait(self, calls: Sequence[Run], launching: float) -> tuple[float, bool]:
        """Microseconds of all calls, and whether they all were launched before the device came to the first."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int((1.5 * launching + 100) * 2000))  # type: ignore[no-untyped-call]  # cycles; 2 GHz at most
        start.record()
        kept = _all(calls)
        ahead = not start.query()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) * 1e3, ahead

    def _captured(self, calls: Sequence[Run], rounds: int) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(rounds):
                    kept = _all(calls)
                del kept
        except RuntimeError as error:
            self.failure = _first_line(error) or "unknown"
            print(f"no CUDA graphs from here on, a capture failed: {self.failure}", file=sys.stderr, flush=True)
            torch.cuda.synchronize()
            return None
        return graph

    def _replayed(self, graph: torch.cuda.CUDAGraph, samples: int) -> list[float]:
        """Microseconds of each replay but the first, which also brings the graph to the device."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        for event in events:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]


def _all(calls: Sequence[Run]) -> list[object]:
    return [call() for call in calls]


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


def grid(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    sparsities: Sequence[float] = SPARSITIES,
    bands: Sequence[int] = BANDS,
    dtypes: Sequence[str] = DTYPES,
) -> list[Call]:
    """The calls to measure, in order. shapes: (in_features, out_features); the product of the backward pass comes with each.

    Bands that are computed like single diagonals are left out: they take the times of those.
    """
    calls: dict[Call, None] = {}
    for sparsity in sparsities:
        for dtype in dtypes:
            for n, m in shapes:
                for band in (b for b in bands if max(n, m) % b == 0):
                    diagonals = max(1, round((1 - sparsity) * max(n, m) / band)) * band
                    for op, inputs, outputs in (("product", n, m), ("product", m, n), ("gradient", n, m)):
                        made = [Call(op, t, inputs, outputs, diagonals, band, dtype) for t in tokens]
                        calls |= {call: None for call in made if band == 1 or call.width > 1}
    return list(calls)


def contenders(call: Call, shared_memory: int) -> list[str]:
    """The kernels worth measuring. shared_memory: bytes that a block of the device may ask for."""
    able = routes.possible(call, shared_memory)
    modelled = routes.modelled(call, able)
    return [kernel for kernel in able if modelled[kernel] <= HOPELESS * min(modelled.values())]


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Within this process, calls take this kernel."""
    natural = cuda.choice
    cuda.choice = lambda call, device: Choice(kernel, "forced")  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda.choice = natural


def work(call: Call, device: torch.device) -> Run:
    """The raw op of the call on random tensors."""
    dtype = getattr(torch, call.dtype)
    x = torch.randn(call.tokens, call.inputs, dtype=dtype, device=device)
    offsets = torch.randperm(call.longer // call.band, device=device)[: call.diagonals // call.band].int()
    if call.op == "gradient":
        dy = torch.randn(call.tokens, call.outputs, dtype=dtype, device=device)
        return lambda: torch.ops.dst_ops.dvalues(dy, x, offsets, call.band)
    values = torch.randn(call.diagonals, call.shorter, dtype=dtype, device=device)
    return lambda: torch.ops.dst_ops.linear(x, values, offsets, call.outputs, call.band, None)


def measure(
    call: Call, kernels: Sequence[str], device: torch.device, timer: Callable[[Run], float]
) -> dict[str, float]:
    """Microseconds of each kernel. timer: gives those of a call. A kernel that refuses the call is named and left out."""
    run = work(call, device)
    times: dict[str, float] = {}
    for kernel in kernels:
        try:
            with forced(kernel):
                times[kernel] = timer(run)
        except RuntimeError as error:
            print(f"{described(call)}: {kernel} refused: {_first_line(error)}", file=sys.stderr, flush=True)
            if device.type == "cuda":
                torch.cuda.synchronize()  # fails if the device is lost; nothing can be measured then
    return times


def sweep(
    calls: Sequence[Call],
    kernels_of: Callable[[Call], list[str]],
    measured: Callable[[Call, list[str]], Mapping[str, float]],
    seconds: float = SECONDS,
) -> list[Point]:
    """Measures call after call, at most about `seconds` long, and prints a line for each: microseconds and the choice."""
    began, points = time.monotonic(), list[Point]()
    for done, call in enumerate(calls):
        if time.monotonic() - began > seconds:
            print(f"{len(calls) - done} of {len(calls)} points left to the model: {seconds:.0f} s are over")
            break
        kernels = kernels_of(call)
        times = measured(call, kernels)
        if not times:
            continue
        points.append((call, times))
        best, guess = quickest(times), quickest(routes.modelled(call, kernels))
        listed = ", ".join(f"{kernel} {us:.4g} us" for kernel, us in times.items())
        print(f"{described(call)}: {listed} -> {best}{'' if best == guess else f' (modelled: {guess})'}", flush=True)
    return points


def summary(points: Sequence[Point], kernels_of: Callable[[Call], list[str]]) -> str:
    """How many points have another kernel than the modelled one, and how much time that saves."""
    losses = []
    for call, times in points:
        guess = quickest(routes.modelled(call, kernels_of(call)))
        if guess != quickest(times) and guess in times:
            losses.append(times[guess] / min(times.values()))
    text = f"{len(points)} points measured, {len(losses)} with another kernel than modelled"
    return f"{text}; there the modelled one takes x{statistics.geometric_mean(losses):.2f} as long" if losses else text


def quickest(times: Mapping[str, float]) -> str:
    """The kernel of the least time."""
    return min(times, key=lambda kernel: times[kernel])


def described(call: Call) -> str:
    """A call in a line."""
    size = f"{call.tokens} tokens, {call.inputs} -> {call.outputs}, {call.diagonals} diagonals in bands of {call.band}"
    return f"{call.op} {call.dtype}, {size}"


def shape(text: str) -> tuple[int, int]:
    """IN:OUT as (in_features, out_features)."""
    n, m = (int(part) for part in text.split(":"))
    if min(n, m) < 1:
        raise ValueError(text)
    return n, m


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where there is nothing to measure."""
    parser = argparse.ArgumentParser(prog="python -m dst_ops.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", type=shape, action="append", metavar="IN:OUT", help="instead of the common ones")
    parser.add_argument("--out", type=Path, help="default: where calls look for the table of this GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    if not build.load("cuda"):
        parser.error("the CUDA kernels could not be built; there is nothing to measure")
    properties: Any = torch.cuda.get_device_properties()
    device = torch.device("cuda", torch.cuda.current_device())
    clock, calls = Clock(samples=5, sample_us=300.0), grid(args.shape or SHAPES)
    torch.manual_seed(0)

    def kernels_of(call: Call) -> list[str]:
        return contenders(call, properties.shared_memory_per_block_optin)

    def measured(call: Call, kernels: list[str]) -> dict[str, float]:
        return measure(call, kernels, device, lambda run: clock.time([run]).median)

    print(
        f"{properties.name}, torch {torch.__version__}: {len(calls)} points, at most {args.seconds:.0f} s", flush=True
    )
    points = sweep(calls, kernels_of, measured, args.seconds)
    if not points:
        parser.error("no kernel could be measured")
    path = args.out or routes.table_path(properties.name)
    routes.write_table(path, properties.name, points)
    print(f"{summary(points, kernels_of)}\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
