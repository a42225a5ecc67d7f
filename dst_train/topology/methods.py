"""The methods: by which scores units are dropped and grown. Everything else about an update is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dst_train.topology import chase, cht, policy, srigl

if TYPE_CHECKING:
    from dst_train.topology.settings import Settings

# dynadiag: units that compete for their place, as a multiple of those dropped.
POOL = 2.0
# dynadiag: how much of an absent unit's alpha each update takes from its growth signal.
SIGNAL_SHARE = 0.3


@dataclass(frozen=True)
class UpdateSpec:
    """What is to happen to one layer. grow, keep: units of each group that are new, and that are active afterwards. fraction:
    the share that changes. progress: share of the updates' time that is over. key: (seed, layer, update), for random choices."""

    method: Method
    settings: Settings
    grow: int
    keep: int
    fraction: float
    progress: float
    key: tuple[int, int, int]


@dataclass(frozen=True)
class UnitScores:
    """What an update knows of a layer's units; tensors [num_units] in float64 on the device of `SparseLayer.units`, equal on all ranks.

    active: bool. value: mean |value|, 0 of absent units. gradient: mean |gradient|, 0 where the method does not measure.
    alpha: learned importance, already `blended`; zeros without a gate. groups: see `SparseLayer`. shape: of the weight. drop:
    how many of a group will be dropped.
    """

    active: Tensor
    value: Tensor
    gradient: Tensor
    alpha: Tensor
    groups: int
    shape: tuple[int, int]
    drop: int
    spec: UpdateSpec


ScoreFn = Callable[[UnitScores], Tensor]


@dataclass(frozen=True)
class Method:
    """drop: the active units with the lowest score go. grow: of the units absent before, those with the highest score come, where
    `active` is what the drop left; None: at random.

    measures: whether the scores need the gradient of all units. gated: whether they need alpha. patterns: what it is for;
    none named: any. choose: in place of drop and grow, all units that are active afterwards, bool [num_units].
    """

    drop: ScoreFn
    grow: ScoreFn | None
    measures: bool
    gated: bool = False
    patterns: tuple[str, ...] = ()
    choose: ScoreFn | None = None


def by_value(units: UnitScores) -> Tensor:
    return units.value


def by_gradient(units: UnitScores) -> Tensor:
    return units.gradient


def by_value_and_gradient(units: UnitScores) -> Tensor:
    """MEST, Yuan et al. 2021, arXiv 2110.14032, section 3: |value| + weight * |gradient|, here the means over a unit."""
    return units.value + units.spec.settings.gradient_weight * units.gradient


def by_links(units: UnitScores) -> Tensor:
    """`cht.scores`, with a unit as a link."""
    return cht.scores(units.active.view(units.shape)).flatten()


def by_sampled_value(units: UnitScores) -> Tensor:
    """CHTs: what stays is a sample in proportion to |value|^(1 + 2 progress), more and more the largest."""
    return policy.sampled(units.value ** (1.0 + 2.0 * units.spec.progress), (*units.spec.key, 0))


def by_sampled_links(units: UnitScores) -> Tensor:
    """CHTs: what grows is a sample in proportion to the score, CH2-L3."""
    links = cht.scores(units.active.view(units.shape), internal=True).flatten()
    return policy.sampled(links, (*units.spec.key, 1))


def by_neurons(units: UnitScores) -> Tensor:
    """`srigl.choose`, with a group as a neuron."""
    value, gradient, active = (t.view(units.groups, -1) for t in (units.value, units.gradient, units.active))
    keep, fraction = units.spec.keep, units.spec.fraction
    after = srigl.choose(
        value, gradient, active, fan_in=keep, fraction=fraction, gamma_sal=units.spec.settings.gamma_sal
    )
    return after.flatten()


def by_channels(units: UnitScores) -> Tensor:
    """`chase.choose`."""
    value, gradient, active = (t.view(units.shape) for t in (units.value, units.gradient, units.active))
    spec = units.spec
    removed = chase.removed_rows(spec.settings.channel_sparsity, units.shape[0], spec.progress)
    after = chase.choose(value, gradient, active, keep=spec.keep, fraction=spec.fraction, removed=removed)
    return after.flatten()


def by_alpha(units: UnitScores) -> Tensor:
    return units.alpha


def by_alpha_among_the_smallest(units: UnitScores) -> Tensor:
    """alpha, for the POOL * drop active units with the smallest mean |value|; no others are dropped.

    alpha alone does not know size: it would drop large units whose gain has levelled off, and at 98 % sparsity that
    costs points of accuracy.
    """
    pool, _ = policy.lowest(units.value, units.active, min(round(POOL * units.drop), int(units.active.sum())))
    scores = torch.full_like(units.alpha, torch.inf)
    scores[pool] = units.alpha[pool]
    return scores


def blended(alpha: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
    """alpha in which absent units have moved towards their growth signal, in standard deviations from their mean."""
    absent = ~active
    if not bool(absent.any()):
        return alpha
    signal = gradient[absent]
    signal = (signal - signal.mean()) / (signal.std(correction=0) + torch.finfo(torch.float64).tiny)
    result = alpha.clone()
    result[absent] = (1 - SIGNAL_SHARE) * alpha[absent] + SIGNAL_SHARE * signal
    return result


METHODS = {
    "set": Method(by_value, None, measures=False),
    "rigl": Method(by_value, by_gradient, measures=True),
    "mest": Method(by_value_and_gradient, None, measures=True),
    "cht": Method(by_value, by_links, measures=False, patterns=("unstructured",)),
    "chts": Method(by_sampled_value, by_sampled_links, measures=False, patterns=("unstructured",)),
    "srigl": Method(by_value, by_gradient, measures=True, patterns=("constant_fan_in",), choose=by_neurons),
    "chase": Method(by_value, by_gradient, measures=True, patterns=("unstructured",), choose=by_channels),
    "dynadiag": Method(by_alpha_among_the_smallest, by_alpha, measures=True, gated=True),
}
# The soft gate of the paper's released code: all units compete by alpha alone until the topology settles.
SOFT = Method(by_alpha, by_alpha, measures=False, gated=True)
