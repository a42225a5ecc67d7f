"""Schedules and selection as pure functions: how many units change, and which, given their scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dst_train.sparse.layer import generator_of

# Of the steps in which the topology changes, the share in which `explore` shrinks to 1.
EXPLORE_SHARE = 0.4


def cosine_drop_fraction(initial: float, step: int, last_step: int) -> float:
    """initial / 2 * (1 + cos(pi step / last_step)), 0 from last_step on (RigL, Evci et al. 2020, arXiv 1911.11134)."""
    if step >= last_step:
        return 0.0
    return initial / 2 * (1 + math.cos(math.pi * step / last_step))


def active_count(start: int, final: int, step: int, last_step: int) -> int:
    """Active units after an update at `step`: from start to final by cosine, over the first EXPLORE_SHARE of the steps."""
    progress = min(1.0, step / (EXPLORE_SHARE * last_step))
    return round(final + (start - final) / 2 * (1 + math.cos(math.pi * progress)))


def temperature(start: float, end: float, step: int, last_step: int) -> float:
    """From start to end by cosine, then constant."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, step / last_step)))


def random_scores(num_units: int, key: tuple[int, ...]) -> Tensor:
    """float64 [num_units] in [0, 1) on the CPU, drawn by the key and by nothing else."""
    return torch.rand(num_units, generator=generator_of(*key), dtype=torch.float64, device="cpu")


def sampled(weight: Tensor, key: tuple[int, ...]) -> Tensor:
    """Scores whose highest are a sample without replacement in proportion to weight [n], float64, drawn by the key alone.

    Those of weight 0 come last, at random among themselves. (An exponential race: Efraimidis and Spirakis 2006.)
    """
    time = -torch.log1p(-random_scores(weight.numel(), key)).to(weight.device)
    return weight.clamp(min=1e-30) / time.clamp(min=1e-30)


def lowest(scores: Tensor, among: Tensor, count: int, groups: int = 1) -> tuple[Tensor, float | None]:
    """The `count` units of each group with the lowest scores, and how clear the cut was; equal scores go to the lower unit.

    scores: [num_units], among: bool [num_units], the candidates, at least `count` in each group. Returns units, int64,
    ascending, and the smallest `margin` over the groups; None where a group had no choice.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int64), None
    # By selection: sorting all entries of a masked layer takes six times as long. topk is kthvalue, and on a GPU not by one block a group.
    candidates = scores.masked_fill(~among, math.inf).view(groups, -1)
    last = candidates.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    chosen, tied = candidates < last, candidates == last
    chosen |= tied & (tied.cumsum(1) <= count - chosen.sum(1, keepdim=True))
    units = torch.nonzero(chosen.flatten()).flatten()
    following = candidates.masked_fill(chosen, math.inf).amin(1, keepdim=True)
    if not bool(following.isfinite().all()):
        return units, None
    larger = torch.maximum(last.abs(), following.abs())
    return units, float(((following - last) / larger.where(larger > 0, 1.0)).min())


def highest(scores: Tensor, among: Tensor, count: int, groups: int = 1) -> tuple[Tensor, float | None]:
    """As `lowest`, with the highest scores."""
    return lowest(-scores, among, count, groups)
