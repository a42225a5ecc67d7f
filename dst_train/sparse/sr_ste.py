"""SrSteLinear: N:M sparsity learned from dense weights (SR-STE, Zhou et al. 2021, arXiv 2102.04010). A baseline for accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst_train.sparse.layer import check_sparsity, count_active


class SrSteLinear(nn.Linear):
    """`y = x (W * mask)^T + b`; mask keeps the N largest |W| of each `size` adjacent entries of a row, anew in every forward pass.

    All of W is trained. Its gradient is that of the masked weight, passed straight through, plus decay * (1 - mask) * W, which
    draws what is masked towards 0 (the SR-STE update of the paper's section 3; as in its code the term is part of the gradient, so
    that Adam scales it). There is nothing for a topology to update, so it is no `SparseLayer`.

    Attributes:
        weight: Parameter [out_features, in_features].
        bias: Parameter [out_features] or None.
        num_units, num_final: entries, and how many of them the mask keeps.

    Args:
        sparsity: N = (1 - sparsity) * size, rounded, at least 1.
        size: M; must divide in_features.
        decay: lambda_W; the paper uses 2e-4.
        accumulation: backward passes per optimiser step, each of which adds its share of the decay.

    Raises:
        ValueError: sparsity outside [0, 1), or a size that does not divide.
    """

    pattern = "sr_ste"
    replaced: type[nn.Module] = nn.Linear  # see SparseLayer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        size: int,
        bias: bool = True,
        decay: float = 2e-4,
        accumulation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sparsity(sparsity)
        if size < 1 or in_features % size:
            raise ValueError(f"size={size}: must divide in_features={in_features}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.size = size
        self.kept = count_active(1.0 - sparsity, size)
        self.num_units = in_features * out_features
        self.num_final = self.num_units // size * self.kept
        self.decay = decay / accumulation

    @torch.no_grad()
    def load_dense_init(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over a dense layer's initialisation as it is, as the paper does; no 1/sqrt(density) for a mask that moves."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @property
    def mask(self) -> Tensor:
        """bool [out_features, in_features]; of equal |W| the lower columns stay."""
        order = self.weight.detach().abs().view(-1, self.size).sort(dim=1, descending=True, stable=True).indices
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : self.kept], True)
        return mask.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return F.linear(x, _StraightThrough.apply(self.weight, self.mask, self.decay), self.bias)

    def to_dense(self) -> Tensor:
        return self.weight * self.mask

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kept} of {self.size}, bias={self.bias is not None}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        # Not the weight itself: ZeRO 3 frees it between the forward and the backward pass.
        ctx.save_for_backward(decay * weight * ~mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (drawn,) = ctx.saved_tensors
        return gradient + drawn, None, None
