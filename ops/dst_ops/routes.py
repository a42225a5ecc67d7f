"""Which CUDA kernel computes a call: the quickest of those that can, by measurement or, where there is none, by a model.

`python -m dst_ops.tune` measures the kernels on the GPU at hand and writes a table of times; a call takes the nearest point of
the table. Without a table, or far from its points, the time of each kernel is estimated by what was measured on an H200. The choice depends on shapes only, never on numbers in tensors: nothing waits for the device.

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
    measured = {} if rounded else {k: t for k, t in nearest(call, table(gpu)).items() if k in able}
    times = measured or modelled(call, able, rounded)
    kernel = min(times, key=lambda k: times[k])
    listed = ", ".join(f"{k} {t:.3g} us" for k, t in sorted(times.items(), key=lambda item: item[1]))
    return Choice(kernel, f"{f'measured on {gpu}' if measured else 'modelled after an H200'}: {listed}")


def possible(call: Call, shared_memory: int) -> list[str]:
    """The kernels that can take a call on a device where a block may ask for so many bytes of shared memory."""
    known = call.dtype in (*HALVES, "float32")
    return [kernel for kernel in KERNELS if known and not _lacks(kernel, call, shared_memory)]


# StreamLayout<W>::bytes and GradientLayout<W>::bytes in csrc/cuda. What copies boxes instead takes more, and fits the chips that can.
STREAM_BYTES = {8: 108544, 16: 114688, 32: 106496, 64: 98304}
GRADIENT_BYTES = {8: 114720, 16: 114720, 32: 114720, 64: 73760}
# few_warps * FewLayout<T, 1, true>::warp, by sizeof(T); band_quads<W>.
ONE_TOKEN_RING_BYTES = {2: 57344, 4: 90112}
BAND_QUADS = {8: 5, 16: 8, 32: 12, 64: 20}
SPARE_BYTES = 2**28  # that packed weights may take beside what the dense one would


def _lacks(kernel: str, call: Call, shared_memory: int) -> bool:
    """What the launchers in csrc/cuda check, too."""
    if kernel == "scalar":
        staged = call.inputs if call.op == "product" else call.longer
        if call.op == "product" and call.tokens == 1 and _one_token_bytes(call) <= shared_memory:
            return False
        return (staged + 1) * 16 + 8 * 1024 > shared_memory
    if kernel == "band":
        if call.width == 1:
            return True
        # The weights are packed for all tiles of outputs, also those that a band does not meet: of many more outputs than inputs they
        # may take gigabytes where the dense weight would not.
        if call.op == "product" and _packed_bytes(call) > 2 * call.inputs * call.outputs + SPARE_BYTES:
            return True
        return (STREAM_BYTES if call.op == "product" else GRADIENT_BYTES)[call.width] > shared_memory
    return False


def _one_token_bytes(call: Call) -> int:
    """FewLayout<T, 1, Scatter>::bytes in csrc/cuda/scalar_few.h, the larger one."""
    size = 4 if call.dtype == "float32" else 2
    return math.ceil((call.inputs + 1) * size / 16) * 16 + ONE_TOKEN_RING_BYTES[size]


def _packed_bytes(call: Call) -> int:
    """Of `Packed` in csrc/cuda/band.h: BAND_QUADS of a lane, for each 64 outputs and each band."""
    return math.ceil(call.outputs / 64) * (call.diagonals // call.width) * BAND_QUADS[call.width] * 32 * 16


# Microseconds: for a call, for 10^9 operations, for a MB (10^6 bytes) of x and y, for a MB of weights. By op, kernel, and dtype,
# width, or whether there are few tokens. Least squares of the relative errors over the 1,872 calls that `dst_ops.tune` measured
# on an H200 (benchmarks/results/table-NVIDIA_H200.json). There its choice takes 1.03 times as long as the best one (geometric
# mean). scalar gradients: for 10^6 numbers that are staged, instead of MB of x and y.
HALF, FLOAT = "half", "float32"
COSTS: dict[tuple[str, str, str | int], tuple[float, float, float, float]] = {
    ("product", "scalar", "few half"): (2.98, 92.8, 2.32, 0.513),
    ("product", "scalar", "few float32"): (2.71, 211, 2.99, 0.306),
    ("product", "scalar", HALF): (4.9, 106, 0.0534, 17.2),
    ("product", "scalar", FLOAT): (4.42, 159, 0.0871, 24.3),
    ("product", "band", 8): (5.89, 17.2, 0.158, 21.3),
    ("product", "band", 16): (5.7, 9.11, 0.152, 12.2),
    ("product", "band", 32): (6.15, 5.32, 0.125, 4.32),
    ("product", "band", 64): (7.17, 3.42, 0.129, 2.81),
    ("product", "dense", HALF): (6.77, 1.04, 0.136, 1.29),
    ("product", "dense", FLOAT): (9.92, 18.6, 0.706, 0.823),
    ("gradient", "scalar", HALF): (16, 131, 0.23, 0.0),
    ("gradient", "scalar", FLOAT): (12.9, 143, 0.472, 0.0),
    ("gradient", "band", 8): (6.04, 21.5, 0.0703, 0.0),
    ("gradient", "band", 16): (7.53, 10.8, 0.103, 0.0),
    ("gradient", "band", 32): (10.8, 6.3, 0.055, 0.0),
    ("gradient", "band", 64): (10.3, 3.4, 0.0684, 0.0),
    ("gradient", "dense", HALF): (4.7, 1.12, 0.0987, 0.958),
    ("gradient", "dense", FLOAT): (4.75, 18.6, 0.519, 0.811),
}
TF32 = 51 / 380  # operations of a dense float32 product, in time, where it may round its factors
FEW_TOKENS = 32  # as in csrc/cuda/scalar.cu


def modelled(call: Call, kernels: list[str], tf32: bool = False) -> dict[str, float]:
    """us of each kernel."""
    return {kernel: _modelled(call, kernel, tf32) for kernel in kernels}


def _modelled(call: Call, kernel: str, tf32: bool) -> float:
    size = 4 if call.dtype == FLOAT else 2
    entries, tokens = call.diagonals * call.shorter, call.tokens
    name: str | int = FLOAT if call.dtype == FLOAT else HALF
    moved = float(tokens * (call.inputs + call.outputs) * size)
    if kernel == "dense":
        entries = call.inputs * call.outputs
    elif kernel == "band":
        name, tokens = call.width, math.ceil(tokens / 128) * 128
    elif call.op == "gradient":  # each block of threads stages the longer side, for 256 positions of a few diagonals
        tokens = math.ceil(tokens / 8) * 8
        blocks = math.ceil(call.shorter / 256) * math.ceil(call.diagonals / (16 if size == 4 else 24))
        moved = tokens * call.longer * blocks
    elif tokens <= FEW_TOKENS:
        name = f"few {name}"
    fixed, operation, activation, weight = COSTS[call.op, kernel, name]
    if tf32 and kernel == "dense":
        operation *= TF32
    return fixed + (operation * 2e-3 * tokens * entries + activation * moved + weight * entries * size) / 1e6


def table_path(gpu: str) -> Path:
    if "DST_OPS_TABLE" in os.environ:
        return Path(os.environ["DST_OPS_TABLE"])
    return build.cache() / f"table-{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}.json"


Point = tuple[Call, Mapping[str, float]]


@functools.cache
def table(gpu: str) -> tuple[Point, ...]:
    """The measured points; none where there is no file, or of another GPU. Read once: a new table serves the next process.

    Raises:
        ValueError: a file that is not such a table, or none where DST_OPS_TABLE says that there is one.
    """
    try:
        path = table_path(gpu)
        text = path.read_text()
    except OSError as error:
        # Nothing was measured for this machine, or by someone whose home folder is not ours.
        if "DST_OPS_TABLE" in os.environ:
            raise ValueError(f"DST_OPS_TABLE: {error}; measure with `python -m dst_ops.tune`, or unset it") from error
        return ()
    try:
        found = json.loads(text)
        if found["gpu"] != gpu:
            return ()
        return tuple((Call(**p["call"]), {k: float(p["us"][k]) for k in p["us"]}) for p in found["points"])
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
        # Few tokens are another kernel's, whose time says nothing of more.
        if call.op == "product" and (point.tokens <= FEW_TOKENS) != (call.tokens <= FEW_TOKENS):
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
