"""A low-rank path beside a sparse weight, for the last part of training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """`y = up (down x)`: `down` is random and stays, `up` is zero at first and learns (LoRA-FA, arXiv 2308.03303).

    While `up` is zero, whether it is computed makes no difference to a model: `active` only saves the time, and keeps
    gradients from `up`. It is True unless a training says otherwise, so that a loaded model needs no knowledge of it.

    Attributes:
        up: Parameter [out_features, rank], zeros at first.
        down: buffer [rank, in_features], normal with variance 1 / in_features, as LoRA-FA draws it.
        active: whether the layer that has the path is to add it.

    Args:
        generator: CPU generator that draws `down`; the global one when None.

    Raises:
        ValueError: a rank below 1 or above min(in_features, out_features).
    """

    down: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank={rank}: must be from 1 to {min(in_features, out_features)}, the smaller side")
        device = torch.get_default_device() if device is None else device
        self.active = True
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        down = torch.randn(rank, in_features, generator=generator, device="cpu") / math.sqrt(in_features)
        self.register_buffer("down", down.to(device=device, dtype=dtype or torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        # DeepSpeed casts parameters, and leaves buffers in fp32.
        return F.linear(F.linear(x, self.down.to(self.up.dtype)), self.up)

    def to_dense(self) -> Tensor:
        """[out_features, in_features]; zero as long as `up` has not learned."""
        return self.up @ self.down.to(self.up.dtype)
