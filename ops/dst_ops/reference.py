"""The definition of the op in plain PyTorch: the fallback on any device, and what the kernels must equal.

W has out_features = M rows and in_features = N columns; P = max(M, N) candidate diagonals of length L = min(M, N).
Entry l of candidate o sits at row (l + o) mod M, column l if M >= N, and at row l, column (l + o) mod N otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_RUN = 64  # tokens; csrc/cpu/layout.h has the same number


def is_feature_major(x: Tensor) -> bool:
    """Whether the tokens of a feature lie side by side in x [..., tokens, features], as in a transposed tensor, on the CPU.

    Kernels for the CPU read such tensors as they are, and give results that lie likewise.
    """
    # Contiguous first: a traced program then depends on no number of tokens.
    return (
        x.device.type == "cpu"
        and x.dim() >= 2
        and not x.is_contiguous()
        and x.mT.is_contiguous()
        and x.shape[-2] >= LEAST_RUN
    )


def as_taken(x: Tensor) -> Tensor:
    """x, copied unless it lies as kernels take it."""
    return x if x.is_contiguous() or is_feature_major(x) else x.contiguous()


def empty(x: Tensor, features: int) -> Tensor:
    """A result [..., features] for x."""
    if is_feature_major(x):
        return x.new_empty((*x.shape[:-2], features, x.shape[-2])).mT
    return x.new_empty((*x.shape[:-1], features))


def candidates(offsets: Tensor, band: int) -> Tensor:
    """Unit numbers [U] -> candidate diagonals [U * band], int64: unit u is u * band ... (u + 1) * band - 1."""
    return (offsets.long()[:, None] * band + torch.arange(band, device=offsets.device)).flatten()


def positions(offsets: Tensor, out_features: int, in_features: int, band: int) -> tuple[Tensor, Tensor]:
    """Rows and columns [K, L] of the stored values."""
    short = torch.arange(min(out_features, in_features), device=offsets.device).expand(offsets.numel() * band, -1)
    long = (short + candidates(offsets, band)[:, None]) % max(out_features, in_features)
    return (long, short) if out_features >= in_features else (short, long)


def to_dense(values: Tensor, offsets: Tensor, out_features: int, in_features: int, band: int) -> Tensor:
    rows, columns = positions(offsets, out_features, in_features, band)
    weight = values.new_zeros(out_features * in_features)
    return weight.index_add(0, (rows * in_features + columns).flatten(), values.flatten()).view(
        out_features, in_features
    )


def linear(
    x: Tensor, values: Tensor, offsets: Tensor, out_features: int, band: int, bias: Tensor | None = None
) -> Tensor:
    wide = sum_dtype(x)
    weight = to_dense(values.to(wide), offsets, out_features, x.shape[-1], band)
    y = x.to(wide) @ weight.t()
    return empty(x, out_features).copy_(y if bias is None else y + bias.to(wide))


def linear_gelu(
    x: Tensor, values: Tensor, offsets: Tensor, out_features: int, band: int, bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """(GELU of the product, the product if it is to be kept, else no numbers)."""
    before = torch.ops.dst_ops.linear(x, values, offsets, out_features, band, bias)
    return F.gelu(before), before if keep else before.new_empty(0)


def linear_transposed(dy: Tensor, values: Tensor, offsets: Tensor, in_features: int, band: int) -> Tensor:
    wide = sum_dtype(dy)
    weight = to_dense(values.to(wide), offsets, dy.shape[-1], in_features, band)
    return empty(dy, in_features).copy_(dy.to(wide) @ weight)


def dvalues(dy: Tensor, x: Tensor, offsets: Tensor, band: int) -> Tensor:
    """[K, L]; one diagonal at a time, so that nothing of size M x N appears."""
    wide = sum_dtype(x)
    m, n = dy.shape[-1], x.shape[-1]
    dy, x = dy.reshape(-1, m).to(wide), x.reshape(-1, n).to(wide)
    short, long = (x, dy) if m >= n else (dy, x)
    rows = [(torch.roll(long, -o, 1)[:, : short.shape[1]] * short).sum(0) for o in candidates(offsets, band).tolist()]
    return torch.stack(rows).to(dtype=wide)


def linear_backward(dy: Tensor, x: Tensor, values: Tensor, offsets: Tensor, band: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and in the dtype of sums of values and of a bias."""
    ops = torch.ops.dst_ops
    dx = ops.linear_transposed(dy, values, offsets, x.shape[-1], band)
    return dx, ops.dvalues(dy, x, offsets, band), ops.sum_of_rows(dy)


def sum_of_rows(dy: Tensor) -> Tensor:
    """[..., M] -> [M], in the dtype of sums."""
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=sum_dtype(dy))


def diagonal_sums(block: Tensor, first_column: int, in_features: int) -> Tensor:
    """Sums of |entries| [P] along the candidates, for columns first_column ... (block [M, columns], fp32) of a matrix.

    Column a of the block becomes row a of a wider matrix, shifted by columns - 1 - a, so that a diagonal becomes a column.
    """
    out_features, columns = block.shape
    width = columns + out_features - 1
    skewed = block.new_zeros(columns * width)
    torch.abs(block, out=skewed.as_strided((out_features, columns), (1, width - 1), columns - 1))
    shift = torch.arange(width, device=block.device) - (columns - 1) - first_column  # row - column
    candidate = shift % out_features if out_features >= in_features else -shift % in_features
    return block.new_zeros(max(out_features, in_features)).index_add_(0, candidate, skewed.view(columns, width).sum(0))


def sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
