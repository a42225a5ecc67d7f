"""A small built-in model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Flattens a sample, then linear layers with GELU after each, then a linear head.

    `layers.0`, `layers.1`, ... and `head` are `nn.Linear`.
    """

    def __init__(self, in_features: int, hidden_features: Sequence[int], num_classes: int) -> None:
        super().__init__()
        widths = [in_features, *hidden_features]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, ...] with in_features numbers a sample -> logits [batch, num_classes]."""
        x = x.flatten(1)
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.head(x)
