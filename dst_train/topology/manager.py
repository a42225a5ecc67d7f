"""Topology: prunes and regrows the units of a model's sparse layers, equally on every rank."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dst_train.sparse import DiagonalLinear, sparse_layers
from dst_train.topology import policy, telemetry
from dst_train.topology.editor import ParameterEditor, editor_for
from dst_train.topology.growth import GrowthSignal
from dst_train.topology.ranks import Ranks

METHODS = ("static", "set", "rigl", "mest")
MEASURED = ("rigl", "mest")  # need the gradient of all candidates in an update step
GROW_SIGNALS = ("exact", "local")


@dataclass(frozen=True)
class LayerUpdate:
    """What one update did to one layer; unit numbers, ascending.

    mean_age: optimiser steps that the active units have been there. explored: share of all units that ever were. uncovered:
    outputs (of a tall layer) or inputs (of a wide one) without any weight. drop_margin, grow_margin: how clear the cut between
    dropped and kept, grown and absent units was, see `telemetry.margin`; None where there was no choice by score.
    """

    name: str
    num_units: int
    dropped: tuple[int, ...]
    grown: tuple[int, ...]
    active: tuple[int, ...]
    mean_age: float
    explored: float
    uncovered: int
    drop_margin: float | None
    grow_margin: float | None

    @property
    def churn(self) -> float:
        """Share of the active units that were replaced."""
        return len(self.grown) / len(self.active)


@dataclass(frozen=True)
class TopologyUpdate:
    """One update of all layers. `digest`: sha256 over all offsets after it."""

    step: int
    number: int
    drop_fraction: float
    seconds: float
    digest: str
    layers: tuple[LayerUpdate, ...]

    @property
    def churn(self) -> float:
        return sum(len(u.grown) for u in self.layers) / sum(len(u.active) for u in self.layers)


class Topology:
    """Dynamic sparse training of the DiagonalLinear layers of `model`.

    Call `bind` once the optimiser exists and `step` after every optimiser step, on all ranks. In an update the units
    with the smallest mean |value| (`mest`: |value| + gradient_weight * |gradient|) are dropped and as many absent ones grow:
    those with the largest growth signal (`rigl`) or random ones (`set`, `mest`). Regrown values and first moments are 0; the second moment of a regrown unit is the
    mean over the layer's surviving rows, because Adam's step counter is shared and a second moment of 0 would make its
    first steps too large. Dropped units do not regrow in the same update.

    Args:
        method: `static` (no updates), `set` (Mocanu et al. 2018), `rigl` (Evci et al. 2020) or `mest` (Yuan et al. 2021, arXiv
            2110.14032; its released code has a gradient_weight of 0 by default, which is `set`).
        total_steps: optimiser steps of the whole training; updates happen every `every` steps before `until * total_steps`.
        drop_fraction: share of the active units replaced at first, decayed by cosine.
        grow_signal: see `GrowthSignal`; `mest` takes |gradient| from it.
        gradient_weight: of `mest`, at least 0.
        seed: random growth is a pure function of (seed, layer, update number).
        accumulation: micro-batches (backward passes) per optimiser step.

    Raises:
        ValueError: an argument out of range, or a model without sparse layers (unless static).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str = "rigl",
        total_steps: int,
        every: int = 100,
        until: float = 0.75,
        drop_fraction: float = 0.3,
        grow_signal: str = "exact",
        gradient_weight: float = 1.0,
        seed: int = 0,
        accumulation: int = 1,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}")
        if grow_signal not in GROW_SIGNALS:
            raise ValueError(f"grow_signal={grow_signal!r}: choose one of {', '.join(GROW_SIGNALS)}")
        for name, value in (("total_steps", total_steps), ("every", every), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name, share in (("until", until), ("drop_fraction", drop_fraction)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{name}={share}: must be in (0, 1]")
        if not gradient_weight >= 0.0:
            raise ValueError(f"gradient_weight={gradient_weight}: must be at least 0")
        self.layers: dict[str, DiagonalLinear] = sparse_layers(model)
        if not self.layers and method != "static":
            raise ValueError("the model has no sparse layers; call sparsify() first, or use method='static'")
        self.method = method
        self.every = every
        self.last_step = int(until * total_steps)
        self.drop_fraction = drop_fraction
        self.gradient_weight = gradient_weight
        self.seed = seed
        self.steps = 0
        self.updates = 0
        self._due = False
        self._accumulation = accumulation
        self._exact = grow_signal == "exact"
        self._editor: ParameterEditor | None = None
        self._ranks: Ranks
        self._signal: GrowthSignal
        self._history: dict[str, telemetry.History] = {}

    def bind(self, target: Any) -> Topology:
        """Attach to a torch optimiser or a DeepSpeed engine. Collective.

        Raises:
            ValueError: a sparse layer that is not optimised. TypeError: another kind of target.
            TopologyMismatchError: the ranks start from different offsets.
        """
        self._ranks = Ranks()
        self._signal = GrowthSignal(self.layers, self._ranks, accumulation=self._accumulation, exact=self._exact)
        self._editor = editor_for(target, self._ranks.world_size)
        for name, layer in self.layers.items():
            self._editor.check(f"{name}.values", layer.values)
        self._ranks.require_equal(self._offsets(), "at the start")
        self._history = {
            name: telemetry.History(offsets, self.layers[name].num_units) for name, offsets in self._offsets().items()
        }
        self._prepare()
        return self

    def step(self, applied: bool = True) -> TopologyUpdate | None:
        """Count one optimiser step and, when it is due, update the topology. Collective.

        Args:
            applied: False when the optimiser skipped the step (overflow): a due update waits for the next step.

        Raises:
            RuntimeError: before `bind`, a score that is not finite, or see `GrowthSignal`.
            TopologyMismatchError: the ranks' offsets differ before or after the update.
        """
        self._require_bound("step")
        self.steps += 1
        update = self._update() if self._due and applied else None
        if update is not None:
            self._due = False
        self._prepare()
        return update

    def state_dict(self) -> dict[str, Any]:
        """Everything but the offsets, which are buffers of the model. After `bind`, else RuntimeError."""
        self._require_bound("state_dict")
        history = {name: history.state_dict() for name, history in self._history.items()}
        return {"steps": self.steps, "updates": self.updates, "due": self._due, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; after `bind`, else RuntimeError, and after the model's own state."""
        self._require_bound("load_state_dict")
        self.steps, self.updates, self._due = state["steps"], state["updates"], state["due"]
        for name, history in self._history.items():
            history.load_state_dict(state["history"][name])
        self._ranks.require_equal(self._offsets(), "after loading")
        self._prepare()

    def digest(self) -> str:
        """sha256 over the offsets of all layers."""
        total = hashlib.sha256()
        for name, offsets in self._offsets().items():
            total.update(name.encode() + offsets.numpy().tobytes())
        return total.hexdigest()

    def _require_bound(self, method: str) -> None:
        if self._editor is None:
            raise RuntimeError(f"Topology.{method}() before bind(): bind it to the optimiser or the engine first")

    def _prepare(self) -> None:
        """Start measuring when the coming step is an update step."""
        coming = self.steps + 1
        if self.method != "static" and coming % self.every == 0 and coming < self.last_step:
            self._due = True
        self._signal.stop()
        if self._due and self.method in MEASURED:
            self._signal.start()

    def _offsets(self) -> dict[str, Tensor]:
        return {name: layer.offsets.detach().cpu() for name, layer in self.layers.items()}

    def _update(self) -> TopologyUpdate:
        started = time.perf_counter()
        before = self._offsets()
        self._ranks.require_equal(before, f"before the topology update at step {self.steps}")
        fraction = policy.cosine_drop_fraction(self.drop_fraction, self.steps, self.last_step)
        changes = []
        for index, (name, scores) in enumerate(self._scores().items()):
            changes.append(self._change_layer(index, name, before[name], scores, fraction))
        self.updates += 1
        self._ranks.require_equal(self._offsets(), f"after the topology update at step {self.steps}")
        seconds = time.perf_counter() - started
        return TopologyUpdate(self.steps, self.updates, fraction, seconds, self.digest(), tuple(changes))

    def _scores(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By layer, on the CPU and equal on all ranks: sums of |value| [slots], second moments [slots], growth [num_units].

        One flat all-reduce for all layers; float64, so that neither the number of ranks nor the way a parameter is
        partitioned shows in the result.
        """
        assert self._editor is not None
        growth = self._signal.take() if self.method in MEASURED else {}
        pieces = []
        for name, layer in self.layers.items():
            pieces.append(self._editor.row_sums(layer.values).view(2, layer.num_active, layer.band).sum(2).flatten())
            pieces.append(growth.get(name, pieces[-1].new_zeros(layer.num_units)))
        flat = self._ranks.sum_(torch.cat(pieces)).cpu()
        result = {}
        for name, layer in self.layers.items():
            k, n = layer.num_active, layer.num_units
            part, flat = flat[: 2 * k + n], flat[2 * k + n :]
            if not bool(part.isfinite().all()):
                raise RuntimeError(
                    f"layer {name}: values, second moments or growth signal are not finite at step {self.steps}"
                )
            result[name] = (part[:k], part[k : 2 * k], part[2 * k :])
        return result

    def _change_layer(
        self, index: int, name: str, offsets: Tensor, scores: tuple[Tensor, Tensor, Tensor], fraction: float
    ) -> LayerUpdate:
        assert self._editor is not None
        layer = self.layers[name]
        magnitude, second, growth = scores
        length = layer.band * min(layer.in_features, layer.out_features)
        if self.method == "mest":
            magnitude = magnitude / length + self.gradient_weight * growth[offsets.long()] / self._ranks.world_size
        count = min(round(fraction * layer.num_active), layer.num_units - layer.num_active)
        slots = policy.smallest(magnitude, offsets, count).sort().values
        if self.method == "rigl":
            grown = policy.largest_inactive(growth, offsets, count)
        else:
            grown = policy.random_inactive(offsets, layer.num_units, count, (self.seed, index, self.updates))
        margins = _margins(magnitude, slots, growth if self.method == "rigl" else None, offsets, grown)
        grown = grown.sort().values
        dropped = offsets[slots].sort().values
        if count:
            survivors = torch.ones(layer.num_active, dtype=torch.bool)
            survivors[slots] = count == layer.num_active
            rows = (slots[:, None] * layer.band + torch.arange(layer.band)).flatten()
            self._editor.reset_rows(layer.values, rows, float(second[survivors].mean() / length))
            after = offsets.clone()
            after[slots] = grown.to(torch.int32)
            layer.offsets.copy_(after)
        history = self._history[name]
        history.change(dropped, grown, self.steps)
        active = layer.offsets.detach().cpu().sort().values
        sides = sorted((layer.in_features, layer.out_features))
        return LayerUpdate(
            name,
            layer.num_units,
            tuple(dropped.tolist()),
            tuple(grown.tolist()),
            tuple(active.tolist()),
            history.mean_age(self.steps),
            history.explored,
            telemetry.uncovered(active, layer.band, *sides),
            *margins,
        )


def _margins(
    magnitude: Tensor, dropped_slots: Tensor, growth: Tensor | None, offsets: Tensor, grown: Tensor
) -> tuple[float | None, float | None]:
    """Of the drop and of the growth; growth: scores [num_units], None where it was random. grown: before they are sorted."""
    kept = torch.ones_like(magnitude, dtype=torch.bool)
    kept[dropped_slots] = False
    drop = grow = None
    if 0 < dropped_slots.numel() < magnitude.numel():
        drop = telemetry.margin(float(magnitude[kept].min()), float(magnitude[dropped_slots].max()))
    if growth is not None and grown.numel() > 0:
        absent = policy.inactive(torch.cat([offsets.long(), grown]), growth.numel())
        if absent.numel():
            grow = telemetry.margin(float(growth[grown].min()), float(growth[absent].max()))
    return drop, grow
