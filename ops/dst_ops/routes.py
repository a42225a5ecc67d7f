"""Which CUDA kernel computes a call: the quickest of those that can, by measurement or, where there is none, by a model.

`python -m dst_ops.tune` measures the kernels on the GPU at hand and writes a table of times; a call takes the nearest point of
the table. Without a table, or far from its points, the time of each kernel is estimated for an H100 from its memory traffic and
the rates below. The choice depends on shapes only, never on numbers in tensors: nothing waits for the device.

Environment: DST_OPS_TABLE (the table's file, default <cache of built libraries>/table-<GPU>.json).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dst_ops import build

KERNELS = ("scalar", "band", "dense")
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Call:
    """A call of a raw op. op: `product` (x to y, or dy to dx) or `gradient` (of the values).

    inputs, outputs: features of what a product reads and writes; of x and dy for a gradient.
    """

    op: str
    tokens: int
    inputs: int
    outputs: int
    diagonals: int
    band: int
    dtype: str

    @property
    def longer(self) -> int:
        return max(self.inputs, self.outputs)

    @property
    def shorter(self) -> int:
        return min(self.inputs, self.outputs)

    @property
    def width(self) -> int:
        """Adjacent diagonals that the band kernels take together; 1 if they can't take the call."""
        fits = self.dtype in HALVES and self.shorter % 8 == 0
        return max((w for w in (64, 32, 16, 8) if fits and self.band % w == 0), default=1)


@dataclass(frozen=True)
class Choice:
    """kernel: `scalar`, `band`, `dense`, or `reference` for what has no kernel."""

    kernel: str
    reason: str


def choose(call: Call, gpu: str, shared_memory: int, tf32: bool = False) -> Choice:
    """gpu: name of the device, to find its table. shared_memory: bytes that a block of it may ask for.

    tf32: whether a dense product in float32 may round its factors; tables are measured without.
    """
    able = possible(call, shared_memory)
    if not able:
        return Choice("reference", f"no kernel for {call.dtype}")
    rounded = tf32 and call.dtype == "float32"
    measured = {} if rounded else nearest(call, table(gpu))
    times = {k: t for k, t in measured.items() if k in able} or modelled(call, able, rounded)
    kernel = min(times, key=lambda k: times[k])
    listed = ", ".join(f"{k} {t:.3g} us" for k, t in sorted(times.items(), key=lambda item: item[1]))
    return Choice(kernel, f"{f'measured on {gpu}' if measured else 'modelled for an H100'}: {listed}")


def possible(call: Call, shared_memory: int) -> list[str]:
    """The kernels that can take a call on a device where a block may ask for so many bytes of shared memory."""
    known = call.dtype in (*HALVES, "float32")
    return [kernel for kernel in KERNELS if known and not _lacks(kernel, call, shared_memory)]


def _lacks(kernel: str, call: Call, shared_memory: int) -> bool:
    """What the launchers in csrc/cuda check, too."""
    if kernel == "scalar":
        staged = call.inputs if call.op == "product" else call.longer
        return (staged + 1) * 16 + 8 * 1024 > shared_memory
    if kernel == "band":
        blocks = 16 + (call.width // 8 + 1) // 2 * 2
        staged = 4096 * (blocks | 1) if call.op == "product" else 110 * 1024
        return call.width == 1 or staged > shared_memory
    return False


# For an H100: bytes / us and operations / us. A matrix product reaches what cuBLAS does, our kernels what their inner loops
# allow (docs/op_cuda.md).
HBM, L2 = 3.0e6 * 0.9, 5.5e6
MATRIX = {"bfloat16": 750e6, "float16": 750e6, "float32": 52e6}
MATRIX_TF32 = 380e6
SCALAR = {"bfloat16": 22e6, "float16": 22e6, "float32": 14.4e6}
BAND = {8: 120e6, 16: 175e6, 32: 270e6, 64: 320e6}
LAUNCH = 2.0  # us


def modelled(call: Call, kernels: list[str], tf32: bool = False) -> dict[str, float]:
    """us of each kernel."""
    size = 4 if call.dtype == "float32" else 2
    activations = call.tokens * (call.inputs + call.outputs) * size
    entries = call.diagonals * call.shorter
    matrix = call.inputs * call.outputs
    rate = MATRIX_TF32 if tf32 else MATRIX[call.dtype]

    def time(operations: float, traffic: float, launches: int) -> float:
        return max(operations, traffic / HBM) + launches * LAUNCH

    times = {}
    useful = 2.0 * call.tokens * entries
    for kernel in kernels:
        if kernel == "scalar":
            times[kernel] = time(
                useful / SCALAR[call.dtype], activations + entries * size, 1 if call.op == "product" else 2
            )
        elif kernel == "band":
            cached = _cached(call) if call.op == "product" else 0.0
            operations = max(useful / BAND[call.width], cached / L2)
            times[kernel] = time(operations, activations + 2 * entries * size, 2)
        else:
            formed = 2 * matrix * (size if call.op == "product" else 4)
            times[kernel] = (
                time(2.0 * call.tokens * matrix / rate, activations + matrix * size, 1) + formed / HBM + 2 * LAUNCH
            )
    return times


def _cached(call: Call) -> float:
    """Bytes that the blocks of a band product read from the L2 cache; see csrc/cuda/band_product.h."""
    weights = call.diagonals * call.shorter * 2 * (call.width + 8) / call.width
    if call.inputs <= 880:  # two tiles of 64 tokens with all features fit a multiprocessor
        return call.tokens * (call.inputs * 2 + weights / 64)
    rows = min(call.outputs, call.inputs + 128 + call.width)  # of the result, that a band meets
    windows = call.diagonals / call.width * rows / 128 * (128 + call.width) * 2
    return call.tokens * (windows + weights / 128)


def table_path(gpu: str) -> Path:
    if "DST_OPS_TABLE" in os.environ:
        return Path(os.environ["DST_OPS_TABLE"])
    return build.cache() / f"table-{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.json"


Point = tuple[Call, Mapping[str, float]]


@functools.cache
def table(gpu: str) -> tuple[Point, ...]:
    """The measured points; none where there is no file. Read once: a new table serves the next process.

    Raises:
        ValueError: a file that is not such a table.
    """
    path = table_path(gpu)
    if not path.exists():
        return ()
    try:
        points = json.loads(path.read_text())["points"]
        return tuple((Call(**p["call"]), {k: float(p["us"][k]) for k in p["us"]}) for p in points)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of dst_ops.tune ({error}); remove it, or measure again") from error


def write_table(path: Path, gpu: str, points: list[Point]) -> None:
    measured = [{"call": asdict(call), "us": dict(times)} for call, times in points]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, "points": measured}, indent=1) + "\n")
    os.replace(partial, path)


def nearest(call: Call, points: tuple[Point, ...]) -> Mapping[str, float]:
    """Times of the nearest point whose every size is within a factor of two; empty if there is none."""
    best: tuple[float, Mapping[str, float]] = (math.inf, {})
    for point, times in points:
        if (point.op, point.dtype, point.width) != (call.op, call.dtype, call.width) or call.tokens == 0:
            continue
        steps = [
            abs(math.log2(a / b))
            for a, b in (
                (point.tokens, call.tokens),
                (point.inputs, call.inputs),
                (point.outputs, call.outputs),
                (point.diagonals / point.longer, call.diagonals / call.longer),
            )
        ]
        if max(steps) <= 1 and sum(steps) < best[0]:
            best = (sum(steps), times)
    return best[1]
