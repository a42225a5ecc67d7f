"""The speed that no program exceeds on this machine: see limits.cpp, which this compiles and calls."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROUNDS = 200_000  # a call takes some 20 ms: long beside the start of its threads
CALLS = 60


class Limits(NamedTuple):
    """fp32 GFLOP/s."""

    registers: float  # multiply-adds on registers
    loads: float  # multiply-adds that load one operand from the first-level cache


def measure(threads: int) -> Limits:
    """The fastest of several calls: a limit is what the machine can do when nothing else runs on it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        compiler = os.environ.get("CXX", "c++").split()
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*compiler, *flags, str(Path(__file__).with_suffix(".cpp")), "-o", str(path)], check=True)
        multiply_add = ctypes.CDLL(str(path)).multiply_add
    multiply_add.restype = ctypes.c_double
    multiply_add.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.POINTER(ctypes.c_float)]
    sink = (ctypes.c_float * threads)()

    def speed(load: int) -> float:
        begin = time.perf_counter()
        operations: float = multiply_add(threads, ROUNDS, load, 0.5, sink)
        return operations / (time.perf_counter() - begin) / 1e9

    return Limits(max(speed(0) for _ in range(CALLS)), max(speed(1) for _ in range(CALLS)))
