"""SRigL: constant fan-in whose neurons may be ablated (Lasby et al. 2023, arXiv 2305.02299, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from dst_train.topology import policy


def choose(
    value: Tensor, gradient: Tensor, active: Tensor, *, fan_in: int, fraction: float, gamma_sal: float
) -> Tensor:
    """The weights that are active after an update; bool [neurons, inputs].

    With K = int(fraction * active weights), the steps 2 to 7 of the paper's section 3:

    - A weight is salient if it is among the active ones that stay when the K smallest |value| go, or among the K absent ones
      with the largest |gradient|.
    - A neuron with fewer than max(1, int(gamma_sal * fan_in)) salient weights is ablated. So many stay, those with the most
      salient weights, as can hold the layer's neurons * fan_in weights.
    - The others share these weights: each gets the new fan-in k', rounded down.
    - The weights of ablated neurons go, then the smallest |value| of the layer until K are gone, then what a neuron has beyond k'.
    - Each neuron grows its largest |gradient| until it has k'. A weight that just went may come back, with its value.

    Where the text leaves room this is the authors' code: salient are the weights that stay (the text has "top-K"), the K gone
    include those of ablated neurons, and saliency alone decides, so that an ablated neuron may come back.

    value, gradient: float64 [neurons, inputs], mean absolute ones. active: bool, same shape. fan_in: before ablation.
    gamma_sal: 0 switches ablation off.
    """
    neurons, inputs = active.shape
    change = min(int(fraction * int(active.sum())), int((~active).sum()))
    stays = _without_smallest(value, active, change)
    grown, _ = policy.highest(gradient.flatten(), ~active.flatten(), change)
    salient = stays.flatten().index_fill(0, grown, True).view_as(active).sum(1)
    alive = torch.ones(neurons, dtype=torch.bool)
    if gamma_sal > 0.0:
        enough = min(neurons * fan_in // inputs, neurons - 1)
        needed = min(max(1, int(gamma_sal * fan_in)), int(salient.sort(descending=True).values[enough]))
        alive = salient >= needed
    new_fan_in = neurons * fan_in // int(alive.sum())
    left = active & alive[:, None]
    left = _without_smallest(value, left, max(0, change - int((active & ~left).sum())))
    left = _best(value, left, torch.full((neurons,), new_fan_in))
    return left | _best(gradient, ~left, (new_fan_in - left.sum(1)) * alive)


def _without_smallest(value: Tensor, among: Tensor, count: int) -> Tensor:
    gone, _ = policy.lowest(value.flatten(), among.flatten(), count)
    return among.flatten().index_fill(0, gone, False).view_as(among)


def _best(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Of each row the count [rows] entries with the highest score, or all where there are fewer; equal ones go to the lower."""
    order = score.masked_fill(~among, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return among & (order.argsort(1) < count[:, None])
