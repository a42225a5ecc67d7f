"""DiagonalLinear: a linear layer whose weight is a sum of K pseudo-diagonals, stored as K rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import dst_ops


class DiagonalLinear(nn.Module):
    """`y = x W^T + b` with a diagonally sparse W of shape [out_features, in_features]; W itself is never stored.

    With P = max(out_features, in_features) candidate diagonals of length L = min(...), a *unit* is `band` adjacent
    candidates. `num_active` of the `num_units` = P / band units are present (DynaDiag, arXiv 2506.11449, section 3).

    Attributes:
        values: Parameter [num_active * band, L]; rows `s * band ... (s + 1) * band - 1` belong to slot s.
        offsets: int32 buffer [num_active]; the unit held by slot s. Its order has no meaning; units do not repeat.
        bias: Parameter [out_features] or None.

    Args:
        sparsity: share of absent weights, in [0, 1); at least one unit stays.
        band: adjacent diagonals per unit; must divide P.
        generator: CPU generator that draws the first offsets; the global one when None.

    Raises:
        ValueError: a size below 1, sparsity outside [0, 1), or a band that does not divide P.
    """

    offsets: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        band: int = 1,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        candidates = max(in_features, out_features)
        if min(in_features, out_features) < 1:
            raise ValueError(f"in_features={in_features}, out_features={out_features}: both must be at least 1")
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
        if band < 1 or candidates % band:
            raise ValueError(f"band={band}: must divide max(in_features, out_features)={candidates}")
        self.in_features = in_features
        self.out_features = out_features
        self.band = band
        self.num_units = candidates // band
        num_active = max(1, round((1.0 - sparsity) * self.num_units))
        offsets = torch.randperm(self.num_units, generator=generator)[:num_active].sort().values
        self.register_buffer("offsets", offsets.to(device=device, dtype=torch.int32))
        length = min(in_features, out_features)
        self.values = nn.Parameter(torch.empty(num_active * band, length, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def num_active(self) -> int:
        return self.offsets.numel()

    @property
    def density(self) -> float:
        """Share of the dense weight's entries that are present."""
        return self.num_active / self.num_units

    def reset_parameters(self) -> None:
        """nn.Linear's uniform initialisation, with the mean number of active inputs of an output in place of in_features."""
        bound = 1.0 / math.sqrt(self.in_features * self.density)
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1.0 / math.sqrt(self.in_features), 1.0 / math.sqrt(self.in_features))

    @torch.no_grad()
    def load_dense_init(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over a dense layer's *initialisation*: its entries on the active diagonals, scaled by 1/sqrt(density).

        The scale makes up for the smaller fan-in, so that the variance of the output equals the dense layer's.
        weight: [out_features, in_features]; bias: [out_features] or None.
        """
        values = dst_ops.from_dense(weight, self.offsets, band=self.band)
        self.values.copy_(values / math.sqrt(self.density))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return dst_ops.diagonal_linear(
            x,
            self.values,
            self.offsets,
            self.bias,
            out_features=self.out_features,
            in_features=self.in_features,
            band=self.band,
        )

    def to_dense(self) -> Tensor:
        """The weight as a dense [out_features, in_features] tensor, for inspection and export."""
        return dst_ops.to_dense(
            self.values, self.offsets, out_features=self.out_features, in_features=self.in_features, band=self.band
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, units={self.num_active}/{self.num_units}, band={self.band}, "
            f"bias={self.bias is not None}"
        )
