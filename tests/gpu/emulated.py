"""The CUDA kernels and their launchers, compiled for the host and put where the CPU's kernels are: see emulator/."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import dst_ops
from dst_ops import build, cuda, reference

EMULATOR = Path(__file__).parent / "emulator"
RUNTIME = EMULATOR / "cuda_emulator.cpp"
SOURCES = build.SOURCES / "cuda"
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
    *("-DDST_OPS_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
)
COUNTERS = ("shared_loads", "shared_waves", "mma_k16", "mma_k8")
OPS = ("linear", "linear_gelu", "linear_transposed", "dvalues", "sum_of_rows")

available = platform.machine() == "x86_64"  # its fibers are switched by a few lines of assembly


def compile_objects(sources: Iterable[Path], folder: Path, *options: str) -> list[Path]:
    """At once."""
    include, compiler = Path(torch.__file__).parent / "include", os.environ.get("CXX", "c++").split()
    objects = {source: folder / f"{source.stem}.o" for source in sources}
    options = (*options, *os.environ.get("CXXFLAGS", "").split())
    command = [*compiler, "-x", "c++", *FLAGS, *options, f"-I{EMULATOR}", "-isystem", str(include)]
    running = [subprocess.Popen([*command, "-c", str(source), "-o", str(to)]) for source, to in objects.items()]
    assert [process.wait() for process in running] == [0] * len(running)
    return list(objects.values())


def link(objects: Iterable[Path], to: Path) -> None:
    compiler, libraries = os.environ.get("CXX", "c++").split(), Path(torch.__file__).parent / "lib"
    subprocess.run([*compiler, "-shared", *objects, "-o", to, f"-L{libraries}", "-ltorch_cpu"], check=True)


def library() -> Path:
    """Compiled for the first run after a change, then taken from the cache of built libraries."""
    key = hashlib.sha256(repr((FLAGS, torch.__version__, os.environ.get("CXX"), os.environ.get("CXXFLAGS"))).encode())
    for path in (*sorted(SOURCES.iterdir()), *sorted(EMULATOR.iterdir())):
        key.update(path.read_bytes())
    path = build.cache() / f"dst_ops_emulated-{key.hexdigest()[:16]}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            folder = Path(name)
            link(compile_objects((RUNTIME, *sorted(SOURCES.glob("*.cu"))), folder), folder / "library.so")
            os.replace(folder / "library.so", path)
    return path


class Emulator:
    """Serves the CPU's tensors from now on in this process."""

    def __init__(self, path: Path) -> None:
        assert dst_ops.load()  # before ours: what is registered last serves
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._major = 9
        cuda._gpu = lambda device: ("emulator", 227 * 1024)
        cuda._product_in_fp32 = lambda a, b: a.float() @ b.float()  # torch has no out_dtype on the CPU
        self._registered = torch.library.Library("dst_ops", "IMPL")
        with warnings.catch_warnings():  # torch 2.11 mentions an override also where it is allowed
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in OPS:
                self._registered.impl(name, _without_autocast(getattr(cuda, name)), "CPU", allow_override=True)
            # Which CUDA doesn't have: made of the ops above, as backward does there.
            self._registered.impl("linear_backward", reference.linear_backward, "CPU", allow_override=True)

    def set(self, *, order: int = 0, count_banks: bool = False, major: int | None = None) -> None:
        """order: in which threads run: 0 forwards, 1 backwards, 2 mixed. major: compute capability of the chip, until it is set anew."""
        self._major = self._major if major is None else major
        self._library.dst_ops_emulator_set(order, int(count_banks), self._major)

    def counts(self) -> dict[str, int]:
        """Since the last call."""
        numbers = (ctypes.c_int64 * len(COUNTERS))()
        self._library.dst_ops_emulator_counts(numbers)
        return dict(zip(COUNTERS, numbers, strict=True))


def _without_autocast(function: Any) -> Any:
    def kernel(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return kernel
