"""The growth signal: how large the gradient of each absent unit would be, measured during one optimiser step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dst_train.sparse import DiagonalLinear, SparseLayer
from dst_train.topology.ranks import Ranks


@dataclass(frozen=True)
class Measured:
    """This rank's share, float64 by layer; ranks sum to the whole. Empty when nothing was measured.

    scores: [num_units], mean |gradient| over a unit's entries. gains: [n, n], see `DiagonalLinear.position_gains`.
    """

    scores: dict[str, Tensor]
    gains: dict[str, Tensor]


class GrowthSignal:
    """Scores all candidate units of all layers while a step's backward passes run.

    `exact`: score = mean over the unit's entries of |gradient summed over micro-batches and ranks|, the same on any
    number of ranks (RigL, Evci et al. 2020, takes the absolute value after the reduction as well). The dense gradient
    of one layer exists in blocks of columns only; with gradient accumulation its signed sum must outlive a micro-batch,
    and one fp32 [out_features, in_features] matrix per layer is held until the last one.
    `local`: sum over micro-batches and ranks of the |gradient| of each; cheaper, and depends on how the batch is cut.
    """

    def __init__(self, layers: dict[str, SparseLayer], ranks: Ranks, *, accumulation: int, exact: bool) -> None:
        self._layers = layers
        self._ranks = ranks
        self._accumulation = accumulation
        self._exact = exact
        self.active = False
        self._seen: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._positions: Mapping[str, Tensor] = {}
        self._gains: dict[str, Tensor] = {}

    def start(self, positions: Mapping[str, Tensor]) -> None:
        """Measure from the next forward pass on. positions: by layer, those whose gains are wanted, int64."""
        self.stop()
        self._positions = positions
        self.active = True
        # Here, as a decorator would have each plan and each import of this package wait seconds for torch's compiler.
        watch = torch.compiler.disable(self._on_forward)
        for name, layer in self._layers.items():
            layer.watch = partial(watch, name)

    def stop(self) -> None:
        """Stop measuring and forget what was measured."""
        self.active = False
        for layer in self._layers.values():
            layer.watch = None
        self._seen.clear()
        self._sums.clear()
        self._scores.clear()
        self._gains.clear()

    def take(self) -> Measured:
        """What was measured. Stops measuring, and forgets it.

        Raises:
            RuntimeError: a layer took no part in some micro-batch of the step.
        """
        if not self.active:
            return Measured({}, {})
        for name in self._layers:
            if self._seen.get(name, 0) != self._accumulation:
                raise RuntimeError(
                    f"layer {name} received a gradient in {self._seen.get(name, 0)} of {self._accumulation} micro-batches "
                    "of an update step; every sparse layer must take part in the loss (keep unused or frozen layers dense), in as "
                    "many backward passes as accumulation says"
                )
        # The reduced scores are equal on all ranks up to the order of atomic adds on a GPU; the share makes them equal.
        share = self._ranks.world_size if self._exact else 1
        scores = {name: self._scores[name].double().div_(share) for name in self._layers}
        gains = {name: gains.double() / share for name, gains in self._gains.items()}
        self.stop()
        return Measured(scores, gains)

    def _on_forward(self, name: str, x: Tensor, y: Tensor) -> None:
        if y.requires_grad:
            version = None if x.is_inference() else x._version
            y.register_hook(partial(self._on_gradient, name, x.detach(), version))

    @torch.no_grad()
    def _on_gradient(self, name: str, x: Tensor, version: int | None, dy: Tensor) -> None:
        layer = self._layers[name]
        # Autograd says so itself, unless the product was of a copy, as it is in autocast.
        if version is not None and x._version != version:
            raise RuntimeError(
                f"the input of layer {name} was changed in place after the layer had read it, so that its gradient is lost to the "
                "growth signal; let what follows make a new tensor (h = h + y in place of h += y)"
            )
        seen = self._seen[name] = self._seen.get(name, 0) + 1
        if seen > self._accumulation:
            raise RuntimeError(
                f"layer {name} received more than {self._accumulation} gradients in a step: it was called more than once in a "
                "micro-batch (a shared layer cannot be dynamically sparse: keep it dense), or there were more backward passes "
                "than accumulation says (Topology(..., accumulation=N) for N of them)"
            )
        x2, dy2 = layer.arrange(x.reshape(-1, layer.in_features)), dy.reshape(-1, layer.out_features)
        if not self._exact:
            scores = layer.unit_scores(x2, dy2, partial(self._on_block, name, None))
            self._scores[name] = self._scores[name] + scores if seen > 1 else scores
        elif seen < self._accumulation:
            if seen == 1:
                self._sums[name] = torch.zeros(
                    layer.out_features, layer.in_features, device=x.device, dtype=torch.float32
                )
            self._sums[name].addmm_(dy2.float().t(), x2.float())
        else:
            held = self._sums.pop(name, None)
            self._scores[name] = layer.unit_scores(x2, dy2, partial(self._on_block, name, held))

    def _on_block(self, name: str, held: Tensor | None, block: Tensor, first_column: int) -> Tensor:
        if held is not None:
            block += held[:, first_column : first_column + block.shape[1]]
        if self._exact:
            block = self._ranks.sum_(block)
        if name in self._positions:
            self._add_gains(name, block, first_column)
        return block

    def _add_gains(self, name: str, block: Tensor, first_column: int) -> None:
        layer, positions = self._layers[name], self._positions[name].to(block.device)
        assert isinstance(layer, DiagonalLinear)
        gains = layer.position_gains(block, first_column, positions)
        self._gains[name] = self._gains[name] + gains if name in self._gains else gains
