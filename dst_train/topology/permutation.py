"""The learned order of a layer's inputs: which positions get other inputs in an update, and which.

An order is dropped and regrown as units are. The positions with the smallest weights give up their inputs, and these are
handed out among them anew, to where the growth signal is largest; the weights there start from zero. So the order is a
permutation at any time, and no [in_features, in_features] matrix exists, as it does where a doubly stochastic one is trained and
hardened at the end (PA-DST, arXiv 2510.14812).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dst_train.sparse import DiagonalLinear
from dst_train.topology.editor import ParameterEditor
from dst_train.topology.ranks import Ranks

# Positions that give up their inputs, as a share of the units that an update drops.
SHARE = 0.1


@dataclass(frozen=True)
class Movable:
    """positions: int64 [n] on the CPU, ascending. second_moment: the mean over the layer's weights. Equal on all ranks."""

    positions: Tensor
    second_moment: float


def movable_positions(
    layers: Mapping[str, DiagonalLinear], drop_fraction: float, editor: ParameterEditor, ranks: Ranks
) -> dict[str, Movable]:
    """Of each layer the SHARE * drop_fraction of the positions with the smallest sum of |value|; equal ones in order.

    Two where it would be one, which could only keep its input. Collective: one all-reduce for all layers.
    """
    if not layers:
        return {}
    shares = [editor.sums(layer.values, layer.position_of, layer.in_features) for layer in layers.values()]
    whole = ranks.sum_(torch.cat(shares, 1)).cpu().split([layer.in_features for layer in layers.values()], 1)
    result = {}
    for (name, layer), sums in zip(layers.items(), whole, strict=True):
        share = round(SHARE * drop_fraction * layer.in_features)
        count = 2 if share == 1 else share
        positions = sums[1].sort(stable=True).indices[:count].sort().values
        result[name] = Movable(positions, float(sums[2].sum()) / (layer.num_active * layer.unit_entries))
    return result


def assign_greedily(gains: Tensor) -> Tensor:
    """A permutation, int64 [n]: position p gets the input of position result[p]; the largest of `gains` [n, n] first.

    Equal gains go to the lower position, then to the lower input.
    """
    n = gains.shape[0]
    result = torch.full((n,), -1)
    free = [True] * n
    for index in gains.flatten().sort(descending=True, stable=True).indices.tolist():
        p, q = divmod(index, n)
        if result[p] < 0 and free[q]:
            result[p], free[q] = q, False
    return result


@torch.no_grad()
def reorder(layer: DiagonalLinear, chosen: Movable, gains: Tensor, editor: ParameterEditor, cold_start: float) -> int:
    """Hands out the inputs of the chosen positions anew; returns how many moved. All ranks call it with the same arguments.

    gains: float64 [n, n] on the CPU, of `DiagonalLinear.position_gains`, over all ranks. cold_start: see `Settings`.
    """
    assert layer.order is not None
    given = chosen.positions[assign_greedily(gains)]
    moved = chosen.positions[given != chosen.positions]
    order = layer.order.cpu()
    order[chosen.positions] = order[given]
    layer.order.copy_(order)
    present = layer.elements(torch.nonzero(layer.units() >= 0).flatten())
    elements = present[torch.isin(layer.position_of(present), moved)]
    editor.write(layer.values, elements, 0.0, cold_start * chosen.second_moment)
    return moved.numel()
