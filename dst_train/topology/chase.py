"""Chase: unstructured sparsity whose channels go one after the other (Yin et al. 2023, arXiv 2305.19454)."""

from __future__ import annotations

import torch
from torch import Tensor

from dst_train.topology import policy


def removed_rows(channel_sparsity: float, rows: int, progress: float) -> int:
    """Rows to be empty when `progress` of the updates is done: the cubic schedule of gradual pruning, as in the authors' code."""
    return round(channel_sparsity * rows * (1.0 - (1.0 - progress) ** 3))


def choose(value: Tensor, gradient: Tensor, active: Tensor, *, keep: int, fraction: float, removed: int) -> Tensor:
    """The weights that are active after an update; bool [rows, inputs], `keep` of them, none in `removed` rows.

    The rows with the smallest mean |value| over their active weights (the paper's unmasked mean magnitude, UMM) are emptied; a
    row without weights has 0, so that those emptied before come first. In the others the smallest |value| go, round(fraction
    * keep) of them, and the largest |gradient| of weights absent before grow until the layer has `keep`: what was emptied is
    shared out. Should there be too few of those, what just went stays, largest |value| first.

    My reading for a linear layer: a channel is a row (an output); each layer loses the same share, where the paper ranks the
    channels of all layers together; and the columns of the next layer that read an emptied output are left to its own topology.

    value, gradient: float64 [rows, inputs], mean absolute ones. So many rows stay as can hold `keep`.
    """
    rows, inputs = active.shape
    mean = (value * active).sum(1) / active.sum(1).clamp(min=1)
    gone, _ = policy.lowest(mean, torch.ones(rows, dtype=torch.bool), min(removed, rows + -keep // inputs))
    alive = torch.ones(rows, dtype=torch.bool).index_fill(0, gone, False)[:, None].expand_as(active)
    present, absent = (active & alive).flatten(), (~active & alive).flatten()
    least = keep - int(absent.sum())
    stay = max(0, least, min(int(present.sum()), keep) - round(fraction * keep))
    kept, _ = policy.highest(value.flatten(), present, stay)
    grown, _ = policy.highest(gradient.flatten(), absent, keep - stay)
    return torch.zeros(rows * inputs, dtype=torch.bool).index_fill(0, torch.cat([kept, grown]), True).view_as(active)
