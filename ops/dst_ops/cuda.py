"""The raw ops on CUDA: a kernel is chosen for each call (routes.py), its launcher is in csrc/cuda."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dst_ops import reference
from dst_ops.routes import HALVES, Call, Choice, choose

# What the CUDA library implements. product and dvalues write what their names say; weight and diagonals serve the dense route.
SCHEMAS = (
    *(
        f"cuda_{kernel}(Tensor x, Tensor values, Tensor offsets, int out_features, int band, bool scatter, Tensor? bias, bool gelu,"
        " Tensor(a!)? before) -> Tensor"
        for kernel in ("scalar", "band")
    ),
    *(
        f"cuda_{kernel}_dvalues(Tensor dy, Tensor x, Tensor offsets, int band) -> Tensor"
        for kernel in ("scalar", "band")
    ),
    "cuda_weight(Tensor values, Tensor offsets, int out_features, int in_features, int band) -> Tensor",
    "cuda_diagonals(Tensor matrix, Tensor offsets, int band) -> Tensor",
    "cuda_sum_of_rows(Tensor dy) -> Tensor",
)


OLDEST = (8, 0)  # compute capability: bf16 on tensor cores and copies in the background


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether the CUDA library has code for a device; says so if not."""
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        said = (
            f"dst_ops: the CUDA kernels need compute capability {OLDEST[0]}.{OLDEST[1]} (A100 or later), {device} has "
            f"{found[0]}.{found[1]}"
        )
        if os.environ.get("DST_OPS_REQUIRE_FUSED") == "1":
            raise RuntimeError(said)
        warnings.warn(
            f"{said}; the reference in plain PyTorch serves instead, which forms the dense weight", stacklevel=2
        )
    return found >= OLDEST


def linear(
    x: Tensor, values: Tensor, offsets: Tensor, out_features: int, band: int, bias: Tensor | None = None
) -> Tensor:
    return _product(x, values, offsets, out_features, band, bias)


def linear_transposed(dy: Tensor, values: Tensor, offsets: Tensor, in_features: int, band: int) -> Tensor:
    return _product(dy, values, offsets, in_features, band, transposed=True)


def linear_gelu(
    x: Tensor, values: Tensor, offsets: Tensor, out_features: int, band: int, bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    before = x.new_empty((*x.shape[:-1], out_features) if keep else (0,))
    y = _product(x, values, offsets, out_features, band, bias, gelu=True, before=before if keep else None)
    return y, before


def dvalues(dy: Tensor, x: Tensor, offsets: Tensor, band: int) -> Tensor:
    kernel = _kernel("gradient", x, dy.shape[-1], offsets, band)
    if kernel == "reference":
        return reference.dvalues(dy, x, offsets, band)
    ops, offsets = torch.ops.dst_ops, offsets.contiguous()
    if kernel == "dense":
        dweight = _product_in_fp32(dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1]))
        return ops.cuda_diagonals(dweight, offsets, band)
    return (ops.cuda_band_dvalues if kernel == "band" else ops.cuda_scalar_dvalues)(dy, x, offsets, band)


def sum_of_rows(dy: Tensor) -> Tensor:
    known = str(dy.dtype).removeprefix("torch.") in (*HALVES, "float32")
    return torch.ops.dst_ops.cuda_sum_of_rows(dy) if known else reference.sum_of_rows(dy)


def _product(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    outputs: int,
    band: int,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    gelu: bool = False,
    before: Tensor | None = None,
) -> Tensor:
    inputs = x.shape[-1]
    kernel = _kernel("product", x, outputs, offsets, band)
    offsets = offsets.contiguous()
    if kernel in ("scalar", "band"):
        op = torch.ops.dst_ops.cuda_band if kernel == "band" else torch.ops.dst_ops.cuda_scalar
        scatter = outputs > inputs or (outputs == inputs and not transposed)  # the result is on the longer side
        return op(x, values, offsets, outputs, band, scatter, bias, gelu, before)
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    if kernel == "dense":
        weight = torch.ops.dst_ops.cuda_weight(values, offsets, rows, columns, band)
        if before is not None:
            _linear_into(before, x, weight, bias)
            return F.gelu(before)
        y = x @ weight if transposed else F.linear(x, weight, bias)
    elif transposed:
        y = reference.linear_transposed(x, values, offsets, outputs, band)
    else:
        y = reference.linear(x, values, offsets, outputs, band, bias)
    if before is not None:
        before.copy_(y)
    return F.gelu(y) if gelu else y


def _linear_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, for half types without rounding on the way."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _kernel(op: str, x: Tensor, outputs: int, offsets: Tensor, band: int) -> str:
    inputs, dtype = x.shape[-1], str(x.dtype).removeprefix("torch.")
    call = Call(op, x.numel() // inputs, inputs, outputs, offsets.numel() * band, band, dtype)
    return choice(call, x.device).kernel


def choice(call: Call, device: torch.device) -> Choice:
    """The kernel of a call on a device."""
    matmul: Any = torch.backends.cuda.matmul
    return _choice(call, device, matmul.fp32_precision == "tf32")


@functools.lru_cache(maxsize=4096)
def _choice(call: Call, device: torch.device, tf32: bool) -> Choice:
    return choose(call, *_gpu(device), tf32)


def _gpu(device: torch.device) -> tuple[str, int]:
    """Its name, and the bytes of shared memory that a block may ask for."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.name, properties.shared_memory_per_block_optin
