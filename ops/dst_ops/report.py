"""Which backend serves which device and dtype, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dst_ops import build


@dataclass(frozen=True)
class BackendEntry:
    """kernel: `fused` (compiled for this op), `reference` (plain PyTorch) or `unbuilt` (decided at first use)."""

    device: str
    dtype: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class BackendReport:
    entries: tuple[BackendEntry, ...]

    def __str__(self) -> str:
        return "\n".join(f"{e.device:>5} {e.dtype:<36} {e.kernel:<9} {e.reason}" for e in self.entries)


def backend_report() -> BackendReport:
    """What serves `diagonal_linear` in this process. Builds and loads nothing."""
    library, error = build.status()
    if library is not None:
        generated = "code generated for the offsets" if build.generates_code() else "no generated code"
        kernels = f"{build.instruction_set()} kernels, {generated}, sums in float32 (float64 for float64)"
        cpu = ("fused", f"{kernels}, loaded from {library}")
    elif error is not None:
        cpu = ("reference", f"the build failed: {error.splitlines()[0]}")
    else:
        path = build.library_path()
        cpu = ("fused", f"built: {path}") if path.is_file() else ("unbuilt", f"is built at first use: {path}")
    entries = [BackendEntry("cpu", "float32, bfloat16, float16, float64", *cpu)]
    if torch.cuda.is_available():
        why = "no CUDA kernel yet: the dense weight is formed for each call and multiplied by cuBLAS"
        entries.append(BackendEntry("cuda", "float32, bfloat16, float16, float64", "reference", why))
    return BackendReport(tuple(entries))
