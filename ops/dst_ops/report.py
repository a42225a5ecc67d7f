"""Which backend serves which device and dtype, which CUDA kernel serves which call, and why."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dst_ops import build, cuda
from dst_ops.routes import Call, Choice

CPU_DTYPES, CUDA_DTYPES = "float32, bfloat16, float16, float64", "float32, bfloat16, float16"


@dataclass(frozen=True)
class BackendEntry:
    """kernel: `fused` (compiled for this op), `reference` (plain PyTorch) or `unbuilt` (decided at first use).

    For a call on CUDA: the kernel's name, see `dst_ops.routes.Choice`.
    """

    device: str
    what: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class BackendReport:
    entries: tuple[BackendEntry, ...]

    def __str__(self) -> str:
        return "\n".join(f"{e.device:>5} {e.what:<36} {e.kernel:<9} {e.reason}" for e in self.entries)


def backend_report(calls: Iterable[Call] = ()) -> BackendReport:
    """What serves the op in this process. Builds and loads nothing.

    calls: for each, the kernel that the current CUDA device would compute it with; ignored where there is none.
    """
    entries = [BackendEntry("cpu", CPU_DTYPES, *_library("cpu", _cpu_details))]
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        served, why = _library("cuda", lambda: "a kernel is chosen for each call")
        if torch.cuda.get_device_capability(device) < cuda.OLDEST:
            served, why = "reference", "the GPU is older than an A100"
        entries.append(BackendEntry("cuda", CUDA_DTYPES, served, why))
        entries.append(BackendEntry("cuda", "float64", "reference", "the dense weight is formed for each call"))
        for call in calls:
            choice = cuda.choice(call, device) if served != "reference" else Choice(served, why)
            what = f"{call.op} {call.tokens} x {call.inputs} -> {call.outputs}, {call.diagonals} diagonals, band {call.band}, {call.dtype}"
            entries.append(BackendEntry("cuda", what, choice.kernel, choice.reason))
    return BackendReport(tuple(entries))


def _library(device: str, details: Callable[[], str]) -> tuple[str, str]:
    library, error = build.status(device)
    if library is not None:
        return "fused", f"{details()}, loaded from {library}"
    if error is not None:
        first, *output = error.splitlines()
        said = next((line for line in output if "error" in line or "not found" in line), "")
        return "reference", f"the build failed: {first}" + (f" ({said.strip()})" if said else "")
    try:
        path = build.library_path(device)
    except (OSError, subprocess.CalledProcessError) as error_of_path:
        return "reference", f"the library cannot be built: {error_of_path}"
    return ("fused", f"built: {path}") if path.is_file() else ("unbuilt", f"is built at first use: {path}")


def _cpu_details() -> str:
    generated = "code generated for the offsets" if build.generates_code() else "no generated code"
    return f"{build.instruction_set()} kernels, {generated}, sums in float32 (float64 for float64)"
