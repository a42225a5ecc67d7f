"""Policies as pure functions on CPU tensors: how many units change, which are dropped, which grow."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def cosine_drop_fraction(initial: float, step: int, last_step: int) -> float:
    """initial / 2 * (1 + cos(pi step / last_step)), 0 from last_step on (RigL, Evci et al. 2020, arXiv 1911.11134)."""
    if step >= last_step:
        return 0.0
    return initial / 2 * (1 + math.cos(math.pi * step / last_step))


def smallest(scores: Tensor, units: Tensor, count: int) -> Tensor:
    """Slots of the `count` smallest scores; equal scores go to the lower unit. scores, units: [slots]."""
    by_unit = torch.argsort(units)
    return by_unit[torch.argsort(scores[by_unit], stable=True)][:count]


def largest_inactive(scores: Tensor, units: Tensor, count: int) -> Tensor:
    """The `count` units outside `units` with the largest scores [num_units]; equal scores go to the lower unit."""
    free = inactive(units, scores.numel())
    return free[torch.argsort(scores[free], descending=True, stable=True)][:count]


def random_inactive(units: Tensor, num_units: int, count: int, key: tuple[int, int, int]) -> Tensor:
    """`count` units outside `units`, drawn by (seed, layer index, update number) and by nothing else."""
    free = inactive(units, num_units)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return free[torch.randperm(free.numel(), generator=generator)][:count]


def inactive(units: Tensor, num_units: int) -> Tensor:
    """The units that are absent, ascending."""
    present = torch.zeros(num_units, dtype=torch.bool)
    present[units.long()] = True
    return torch.nonzero(~present).flatten()
