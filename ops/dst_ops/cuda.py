"""The raw ops on CUDA: a kernel is chosen for each call (routes.py), its launcher is in csrc/cuda."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dst_ops import reference
from dst_ops.routes import Call, Choice, choose

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
)


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
    call = Call(
        "gradient",
        _tokens(x),
        x.shape[-1],
        dy.shape[-1],
        offsets.numel() * band,
        band,
        str(x.dtype).removeprefix("torch."),
    )
    kernel = choice(call, x.device).kernel
    if kernel == "reference":
        return reference.dvalues(dy, x, offsets, band)
    ops = torch.ops.dst_ops
    if kernel == "dense":
        return ops.cuda_diagonals(_dense_gradient(dy, x), offsets, band)
    return (ops.cuda_band_dvalues if kernel == "band" else ops.cuda_scalar_dvalues)(dy, x, offsets.contiguous(), band)


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
    call = Call(
        "product", _tokens(x), inputs, outputs, offsets.numel() * band, band, str(x.dtype).removeprefix("torch.")
    )
    kernel = choice(call, x.device).kernel
    if kernel in ("scalar", "band"):
        op = torch.ops.dst_ops.cuda_band if kernel == "band" else torch.ops.dst_ops.cuda_scalar
        scatter = outputs > inputs or (outputs == inputs and not transposed)  # the result is on the longer side
        return op(x, values, offsets.contiguous(), outputs, band, scatter, bias, gelu, before)
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    if kernel == "dense":
        weight = torch.ops.dst_ops.cuda_weight(values, offsets.contiguous(), rows, columns, band)
        y = x @ weight if transposed else F.linear(x, weight, bias)
    elif transposed:
        y = reference.linear_transposed(x, values, offsets, outputs, band)
    else:
        y = reference.linear(x, values, offsets, outputs, band, bias)
    if before is not None:
        before.copy_(y)
    return F.gelu(y) if gelu else y


def _dense_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x in fp32, for half types without rounding on the way."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if x.dtype == torch.float32:
        return dy.t() @ x
    return torch.mm(dy.t(), x, out_dtype=torch.float32) if x.is_cuda else dy.t().float() @ x.float()


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def choice(call: Call, device: torch.device) -> Choice:
    """The kernel of a call on a device."""
    matmul: Any = torch.backends.cuda.matmul
    return _choice(call, device, matmul.fp32_precision == "tf32")


@functools.lru_cache(maxsize=4096)
def _choice(call: Call, device: torch.device, tf32: bool) -> Choice:
    if device.type != "cuda":  # kernels that tests run on the host
        return choose(call, "emulator", 227 * 1024)
    properties: Any = torch.cuda.get_device_properties(device)
    return choose(call, properties.name, properties.shared_memory_per_block_optin, tf32)
