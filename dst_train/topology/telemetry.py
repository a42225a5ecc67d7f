"""What a topology update tells of itself: how long units live, how many were tried, how clear the choice was, what W misses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class History:
    """Which units of a layer were ever active, and since when those are that are. Equal on all ranks."""

    BYTES_PER_UNIT = 9  # of `since` and `tried`

    def __init__(self, units: Tensor, num_units: int) -> None:
        """units: the active ones, int64 [k], taken as grown at step 0. All of it is kept on the host."""
        self.since = torch.full((num_units,), -1, dtype=torch.int64)  # optimiser step; -1: absent
        self.since[units.cpu()] = 0
        self.tried = self.since >= 0

    def change(self, dropped: Tensor, grown: Tensor, step: int) -> None:
        """dropped, grown: units, int64."""
        dropped, grown = dropped.cpu(), grown.cpu()
        self.since[dropped] = -1
        self.since[grown] = step
        self.tried[grown] = True

    def mean_age(self, step: int) -> float:
        """Optimiser steps since the active units grew."""
        return float((step - self.since[self.since >= 0]).double().mean())

    @property
    def explored(self) -> float:
        """Share of all units that were active at some time: the in-time over-parametrisation rate of a layer, R_s in
        "Do We Actually Need Dense Over-Parameterization?" (Liu et al. 2021, arXiv 2102.02887)."""
        return float(self.tried.double().mean())

    def state_dict(self) -> dict[str, Any]:
        return {"since": self.since.clone(), "tried": self.tried.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.since, self.tried = state["since"].clone(), state["tried"].clone()


def uncovered(units: Tensor, band: int, length: int, longer: int) -> int:
    """Rows (of a tall weight) or columns (of a wide one) in which no unit has an entry: outputs or inputs that are dead.

    units: the active ones [slots]. length, longer: the shorter and the longer side. A unit reaches band + length - 1
    neighbours of the longer side, from its first candidate on, around the end.
    """
    change = torch.zeros(2 * longer + 1, dtype=torch.int64)
    first = units.long() * band
    one = torch.ones_like(first)
    change.index_add_(0, first, one).index_add_(0, first + min(band + length - 1, longer), -one)
    reached = change.cumsum(0)[: 2 * longer].view(2, longer).sum(0)
    return int((reached == 0).sum())
