"""SdgpLinear: dense, with the gradient of its output pruned N:M on its way to the input (McDanel et al. 2022, arXiv 2202.00774)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dst_train.sparse.layer import check_sparsity, count_active


class SdgpLinear(nn.Linear):
    """`y = x W^T + b`, all dense. In the backward pass dx = prune(dy) W, while the gradients of W and b take dy as it is.

    prune keeps the N largest |dy| of each `size` adjacent outputs and multiplies by sum |dy| / sum |kept|, so that the mean
    magnitude stays; as in the authors' code (`maxnorm`) the sums are of one sample and output. There they run over the positions
    of an image, here over the dimensions between the first and the last of dy, such as tokens. Without them a sum has one
    term and nothing is rescaled. It is computed with dense products: a baseline for accuracy, not for speed.

    Attributes:
        weight: Parameter [out_features, in_features].
        bias: Parameter [out_features] or None.
        num_units, num_final: entries of the weight, which are all there.

    Args:
        sparsity: of the gradient: N = (1 - sparsity) * size, rounded, at least 1. The paper has 2 of 4.
        size: M; must divide out_features.

    Raises:
        ValueError: sparsity outside [0, 1), or a size that does not divide.
    """

    pattern = "sdgp"
    replaced: type[nn.Module] = nn.Linear  # see SparseLayer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sparsity(sparsity)
        if size < 1 or out_features % size:
            raise ValueError(f"size={size}: must divide out_features={out_features}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.size = size
        self.kept = count_active(1.0 - sparsity, size)
        self.num_units = self.num_final = in_features * out_features

    @torch.no_grad()
    def load_dense_init(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over a dense layer's initialisation."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        weight: Tensor = self.weight
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            # Autocast does not reach into a Function's backward pass.
            x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
        y = _Product.apply(x, weight, self.kept, self.size)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_dense(self) -> Tensor:
        """The weight, as in the other patterns."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, gradient {self.kept} of {self.size}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: int, size: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kept, ctx.size = kept, size
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = pruned(dy, ctx.kept, ctx.size) @ weight if needs_x else None
        dw = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return dx, dw, None, None


def pruned(dy: Tensor, kept: int, size: int) -> Tensor:
    """dy [samples, ..., outputs] with the `kept` largest |dy| of each `size` adjacent outputs, rescaled as `SdgpLinear` says.

    Of equal ones the lower outputs stay. A sample and output of which nothing is kept stays 0.
    """
    magnitude = dy.abs()
    order = magnitude.reshape(-1, size).sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :kept], True).view_as(dy)
    between = tuple(range(1, dy.dim() - 1))
    if not between:
        return dy * mask
    whole = magnitude.float().sum(between, keepdim=True)
    left = (magnitude * mask).float().sum(between, keepdim=True)
    return dy * mask * (whole / left.where(left > 0, 1.0)).to(dy.dtype)
