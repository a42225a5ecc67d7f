"""One topology update: the scores of all layers in one all-reduce, then what changes in each layer, and what to tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dst_train.sparse import DiagonalLinear, MaskedLinear, SparseLayer
from dst_train.topology import methods, policy, telemetry
from dst_train.topology.editor import ParameterEditor
from dst_train.topology.methods import UnitScores, UpdateSpec
from dst_train.topology.ranks import Ranks


@dataclass(frozen=True)
class LayerUpdate:
    """What one update did to one layer; unit numbers, ascending.

    mean_age: optimiser steps that the active units have been there. explored: share of all units that ever were. uncovered:
    outputs (of a tall or masked layer) or inputs (of a wide one) without any weight. drop_margin, grow_margin: how clear the cut between
    dropped and kept, grown and absent units was, as a share of the larger score; None where there was no choice by score.
    gates: by which alpha weighs the active units after the update, effective_units: (sum of them)^2 / sum of their squares,
    temperature: of the soft gate; None without them. moved: inputs that changed their position; None without a permutation.
    """

    name: str
    num_units: int
    dropped: tuple[int, ...]
    grown: tuple[int, ...]
    active: tuple[int, ...]
    mean_age: float
    explored: float
    uncovered: int | None
    drop_margin: float | None
    grow_margin: float | None
    gates: tuple[float, ...] | None = None
    effective_units: float | None = None
    temperature: float | None = None
    moved: int | None = None

    @property
    def churn(self) -> float:
        """Share of the active units that are new."""
        return len(self.grown) / len(self.active)


@dataclass(frozen=True)
class TopologyUpdate:
    """One update of all layers. `digest`: sha256 over the active units of all layers after it."""

    step: int
    number: int
    drop_fraction: float
    seconds: float
    digest: str
    layers: tuple[LayerUpdate, ...]

    @property
    def churn(self) -> float:
        return sum(len(u.grown) for u in self.layers) / sum(len(u.active) for u in self.layers)


@dataclass(frozen=True)
class ReducedScores:
    """Of one layer, float64 on the device of its `units` and equal on all ranks: [slots] mean |value| and second moment,
    [num_units] gradient; alpha and its second moment [num_units], zeros without a gate."""

    value: Tensor
    second_moment: Tensor
    gradient: Tensor
    alpha: Tensor
    alpha_second_moment: Tensor


def gather(
    layers: Mapping[str, SparseLayer], editor: ParameterEditor, ranks: Ranks, gradients: Mapping[str, Tensor], step: int
) -> dict[str, ReducedScores]:
    """One flat all-reduce; float64, so that neither the number of ranks nor the cut of a partition shows in the result.

    gradients: this rank's share of `GrowthSignal`, empty when it was not measured.

    Raises:
        RuntimeError: a score that is not finite.
    """
    pieces: list[Tensor] = []
    devices = []
    for name, layer in layers.items():
        held = layer.units()
        devices.append(held.device)
        sums = editor.sums(layer.stored, layer.slot_of, held.numel())
        pieces.append(sums[1:].flatten())
        if name in gradients:  # of a mask it is as large as the weight: what is not there is not sent as zeros
            pieces.append(gradients[name])
        if layer.alpha is not None:
            pieces.append(editor.sums(layer.alpha, lambda element: element, layer.num_units)[[0, 2]].flatten())
    lengths = [piece.numel() for piece in pieces]
    parts = iter(ranks.sum_(torch.cat(pieces)).split(lengths))
    result = {}
    for (name, layer), device in zip(layers.items(), devices, strict=True):
        none = torch.zeros((), dtype=torch.float64, device=device).expand(2, layer.num_units)
        values = next(parts).to(device).view(2, -1).div_(layer.unit_entries)
        gradient = next(parts).to(device).div_(ranks.world_size) if name in gradients else none[0]
        alpha = next(parts).to(device).view(2, -1) if layer.alpha is not None else none
        # A sum is finite if all that is in it is, and takes a tenth of the time of asking each.
        if not all(bool(t.sum().isfinite()) for t in (values, gradient, alpha)):
            raise RuntimeError(f"layer {name}: values, second moments or growth signal are not finite at step {step}")
        result[name] = ReducedScores(values[0], values[1], gradient, alpha[0], alpha[1])
    return result


@dataclass(frozen=True)
class LayerResult:
    """What happened to one layer. dropped, grown: units, int64, ascending. alpha: [num_units] afterwards. On the device of
    the layer's `units`."""

    dropped: Tensor
    grown: Tensor
    drop_margin: float | None
    grow_margin: float | None
    alpha: Tensor


def update_layer(layer: SparseLayer, scores: ReducedScores, spec: UpdateSpec, editor: ParameterEditor) -> LayerResult:
    """Drops and grows units of one layer. All ranks call it with the same arguments."""
    held = layer.units()
    with held.device:
        filled = held >= 0
        active = torch.zeros(layer.num_units, dtype=torch.bool)
        active[held[filled]] = True
        value = torch.zeros(layer.num_units, dtype=torch.float64)
        value[held[filled]] = scores.value[filled]
        alpha = methods.blended(scores.alpha, scores.gradient, active) if spec.method.gated else scores.alpha
        drop = spec.grow + int(active.sum()) // layer.num_groups - spec.keep
        shape = (layer.out_features, layer.in_features)
        units = UnitScores(active, value, scores.gradient, alpha, layer.num_groups, shape, drop, spec)
        dropped, grown, drop_margin, grow_margin = _choose(units)
    kept = active.index_fill(0, dropped, False)
    # New units start from the mean of those that stay; with nothing kept there is no better guess than what all had.
    models = kept if bool(kept.any()) else active
    if dropped.numel() or grown.numel():
        slots = layer.replace(dropped, grown)
        second_moment = spec.settings.cold_start * float(
            scores.second_moment[filled & models[held.clamp(min=0)]].mean()
        )
        occupied = layer.units()[slots] >= 0
        editor.write(layer.stored, layer.elements(slots[occupied]), 0.0, second_moment)
        editor.write(layer.stored, layer.elements(slots[~occupied]), 0.0, 0.0)
    if layer.alpha is not None:
        alpha[grown] = alpha[models].mean()
        others = torch.nonzero(~kept).flatten()
        editor.write(layer.alpha, others, alpha[others], float(scores.alpha_second_moment[models].mean()))
    return LayerResult(dropped, grown, drop_margin, grow_margin, alpha)


def _choose(units: UnitScores) -> tuple[Tensor, Tensor, float | None, float | None]:
    """Units dropped and grown, ascending, and how clear the cuts were."""
    spec, active = units.spec, units.active
    method = spec.method
    if method.choose is not None:
        after = method.choose(units)
        return torch.nonzero(active & ~after).flatten(), torch.nonzero(after & ~active).flatten(), None, None
    dropped, drop_margin = policy.lowest(method.drop(units), active, units.drop, units.groups)
    left = replace(units, active=active.index_fill(0, dropped, False))
    wish = method.grow(left) if method.grow else policy.random_scores(active.numel(), spec.key).to(active.device)
    grown, grow_margin = policy.highest(wish, ~active, spec.grow, units.groups)
    return dropped, grown, drop_margin, grow_margin if method.grow else None


def describe(name: str, layer: SparseLayer, result: LayerResult, history: telemetry.History, step: int) -> LayerUpdate:
    """What to tell of a change that was made at `step`; history already knows it."""
    units = layer.units()
    active = units[units >= 0].sort().values
    gates = None if layer.gate is None else layer.gates(result.alpha, active)
    uncovered = None
    if isinstance(layer, DiagonalLinear):
        uncovered = telemetry.uncovered(active, layer.band, *sorted((layer.in_features, layer.out_features)))
    elif isinstance(layer, MaskedLinear):
        uncovered = layer.out_features - int(layer.mask.any(1).sum())
    return LayerUpdate(
        name,
        layer.num_units,
        tuple(result.dropped.tolist()),
        tuple(result.grown.tolist()),
        tuple(active.tolist()),
        history.mean_age(step),
        history.explored,
        uncovered,
        result.drop_margin,
        result.grow_margin,
        gates=None if gates is None else tuple(gates.tolist()),
        effective_units=None if gates is None else float(gates.sum() ** 2 / gates.square().sum()),
        temperature=layer.temperature if layer.gate == "soft" else None,
    )
