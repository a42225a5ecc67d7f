"""Topology: prunes and regrows the units of a model's sparse layers, equally on every rank."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dst_train.sparse import DiagonalLinear, SparseLayer, sparse_layers
from dst_train.topology import permutation, policy, telemetry
from dst_train.topology.editor import ParameterEditor, editor_for
from dst_train.topology.growth import GrowthSignal
from dst_train.topology.methods import METHODS, SOFT, UpdateSpec
from dst_train.topology.ranks import Ranks
from dst_train.topology.settings import Settings
from dst_train.topology.update import TopologyUpdate, describe, gather, update_layer

# Where an update makes tensors, whatever the default device is; those of a layer's units are made where `SparseLayer.units` are.
HOST = torch.device("cpu")


class Topology:
    """Dynamic sparse training of the sparse layers of `model`.

    Call `bind` once the optimiser exists and `step` after every optimiser step, on all ranks. An update drops the active
    units with the lowest scores and grows as many absent ones: see `METHODS`. Regrown values and first moments are 0. Dropped
    units do not regrow in the same update. A layer with more active units than are to stay (`explore`) drops the surplus over
    the first updates, by cosine. Layers with a permutation are reordered in the same updates: see
    `dst_train.topology.permutation`.

    Args:
        settings: see `Settings`; `total_steps` must be given.

    Raises:
        ValueError: a setting out of range, a model without sparse layers (unless static), layers whose gates do not fit the
            method, a pattern that the method is not for, more units than are to stay when there is no update to drop
            them, or a permutation that no update changes.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.layers: dict[str, SparseLayer] = sparse_layers(model)
        if not self.layers and self.settings.method != "static":
            raise ValueError(
                "the model has no sparse layers; call sparsify() first, or use method='static' "
                "(also for the patterns sr_ste, butterfly and sdgp alone, which have no topology to update)"
            )
        self.steps = 0
        self.updates = 0
        self._due = False
        self._hook: RemovableHandle | None = None  # a DeepSpeed engine tells of each step, whether it was applied
        self._stepped = False
        self._editor: ParameterEditor | None = None
        self._ranks: Ranks
        self._signal: GrowthSignal
        self._history: dict[str, telemetry.History] = {}
        self._ordered = {
            name: layer
            for name, layer in self.layers.items()
            if isinstance(layer, DiagonalLinear) and layer.order is not None
        }
        self._movable: dict[str, permutation.Movable] = {}
        self._soft = any(layer.gate == "soft" for layer in self.layers.values())
        self._method = SOFT if self._soft else METHODS.get(self.settings.method)
        self._check_layers()

    @property
    def update_steps(self) -> range:
        """The optimiser steps after which updates come, unless they are skipped."""
        s = self.settings
        return range(s.every, s.last_step, s.every) if self._method is not None else range(0)

    @property
    def warning(self) -> str | None:
        """What to say of layers in which no update grows a unit, as drop_fraction of so few of them rounds to 0."""
        steps, method = self.update_steps, self._method
        if not steps or method is None or method.choose is not None or self._soft:
            return None
        # The first update replaces most: the fraction and the units fall from there.
        fraction = policy.cosine_drop_fraction(self.settings.first_drop_fraction, steps[0], self.settings.last_step)
        still = [
            f"{name} ({layer.num_final // layer.num_groups} of {layer.num_units // layer.num_groups})"
            for name, layer in self.layers.items()
            if layer.num_final < layer.num_units and round(fraction * self._kept(layer, steps[0])) == 0
        ]
        if not still:
            return None
        told = ", ".join(still[:3]) + (", ..." if len(still) > 3 else "")
        return (
            f"nothing grows in {len(still)} of {len(self.layers)} layers, whose units are too few for drop_fraction "
            f"{self.settings.first_drop_fraction:g} (a smaller band or a larger fraction replaces some): {told}"
        )

    @property
    def held_bytes(self) -> int:
        """What each rank holds in an update step for the growth signal of several micro-batches, see `GrowthSignal`."""
        s = self.settings
        if not self._measures or s.accumulation == 1 or s.grow_signal != "exact":
            return 0
        return sum(4 * layer.in_features * layer.out_features for layer in self.layers.values())

    @property
    def _measures(self) -> bool:
        return self._method is not None and (self._method.measures or bool(self._ordered))

    def __str__(self) -> str:
        s, steps = self.settings, self.update_steps
        if self._method is None:
            return "static: no updates"
        if not steps:
            return f"{s.method}: no updates, as every={s.every} is not below until * total_steps={s.last_step}"
        text = f"{s.method}: {len(steps)} updates, after steps {steps[0]} to {steps[-1]}"
        return text if self.warning is None else f"{text}; {self.warning}"

    def bind(self, target: Any) -> Topology:
        """Attach to a torch optimiser or a DeepSpeed engine. Collective.

        Raises:
            ValueError: a sparse layer that is not optimised, or frozen. TypeError: another kind of target.
            TopologyMismatchError: the ranks start from different offsets.
        """
        s, self._ranks = self.settings, Ranks()
        self._signal = GrowthSignal(
            self.layers, self._ranks, accumulation=s.accumulation, exact=s.grow_signal == "exact"
        )
        self._editor = editor_for(target, self._ranks.world_size)
        self._unhook()
        if hasattr(target, "_optimizer_step_post_hooks"):  # a torch optimiser, but for wrappers that only look like one
            self._hook = target.register_step_post_hook(self._note_step)
        for name, layer in self.layers.items():
            for key, parameter in (("weight", layer.stored), ("alpha", layer.alpha)):
                if parameter is not None:
                    self._editor.check(f"{name} ({key})", parameter)
        self._require_equal("at the start")
        with HOST:
            for name, layer in self.layers.items():
                units = layer.units()
                self._history[name] = telemetry.History(units[units >= 0], layer.num_units)
            self._prepare()
        return self

    def close(self) -> None:
        """Free the process group of a bound topology, for a process that goes on to another. Collective."""
        self._require_bound("close")
        self._signal.stop()
        self._unhook()
        self._ranks.close()

    def step(self, applied: bool = True) -> TopologyUpdate | None:
        """Count one optimiser step and, when it is due, update the topology. Collective.

        Args:
            applied: False when the optimiser skipped the step (overflow): a due update waits for the next step.

        Raises:
            RuntimeError: before `bind`, without a step of a torch optimiser since the last one, a score that is not finite, or see
                `GrowthSignal`.
            TopologyMismatchError: the ranks' offsets differ before or after the update.
        """
        self._require_bound("step")
        self._check_order(applied)
        self.steps += 1
        with HOST:
            update = self._update() if self._due and applied else None
            if update is not None:
                self._due = False
            self._prepare()
        return update

    def set_temperature(self, step: int) -> None:
        """Set the soft gates' temperature for an optimiser step; a function of the step, and no part of the state."""
        if self._soft:
            temperature = policy.temperature(*self.settings.temperature, step, self.settings.last_step)
            for layer in self.layers.values():
                layer.temperature = temperature

    def state_dict(self) -> dict[str, Any]:
        """Everything but the active units, which are buffers of the model. After `bind`, else RuntimeError."""
        self._require_bound("state_dict")
        history = {name: history.state_dict() for name, history in self._history.items()}
        return {"steps": self.steps, "updates": self.updates, "due": self._due, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; after `bind`, else RuntimeError, and after the model's and optimiser's own state."""
        self._require_bound("load_state_dict")
        self.steps, self.updates, self._due = state["steps"], state["updates"], state["due"]
        for name, history in self._history.items():
            history.load_state_dict(state["history"][name])
        self._require_equal("after loading")
        with HOST:
            self._prepare()

    def digest(self) -> str:
        """sha256 over the layouts of all layers, and the orders of their inputs."""
        total = hashlib.sha256()
        for name, tensor in self._layouts().items():
            total.update(name.encode() + tensor.cpu().numpy().tobytes())
        return total.hexdigest()

    def _require_bound(self, method: str) -> None:
        if self._editor is None:
            raise RuntimeError(f"Topology.{method}() before bind(): bind it to the optimiser or the engine first")

    def _note_step(self, *_: object) -> None:
        self._stepped = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hook on its optimiser, which torch does not copy."""
        return {**self.__dict__, "_hook": None}

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _check_order(self, applied: bool) -> None:
        """Between the backward pass and the optimiser's step the gradients are those of units that an update would drop."""
        stepped, self._stepped = self._stepped, False
        if self._hook is not None and applied and not stepped:
            raise RuntimeError(
                "Topology.step() without a step of the optimiser since the last one: call it once after each optimizer.step(), and "
                "step(False) where that was skipped, as a GradScaler does when gradients overflow"
            )

    def _require_equal(self, moment: str) -> None:
        self._ranks.require_equal(self._layouts(), moment)

    def _check_layers(self) -> None:
        if self._ordered and self._method is None:
            raise ValueError(
                f"layer {next(iter(self._ordered))} has a permutation, which method='static' never changes"
            )
        gated = self.settings.method == "dynadiag"
        patterns = self._method.patterns if self._method is not None else ()
        for name, layer in self.layers.items():
            if patterns and layer.pattern not in patterns:
                raise ValueError(
                    f"layer {name} has pattern={layer.pattern!r} and method={self.settings.method!r} is for {', '.join(patterns)}; "
                    "change the layer's rule, or the method"
                )
            if gated != (layer.gate is not None):
                needs = "needs" if gated else "does not take"
                raise ValueError(
                    f"layer {name} has gate={layer.gate!r} and method={self.settings.method!r} {needs} gates; give sparsify() "
                    "gate='straight_through' for dynadiag, and no gate for other methods"
                )
            if self._soft and (layer.gate != "soft" or layer.num_start < layer.num_units):
                raise ValueError(
                    f"layer {name} starts with {layer.num_start} of {layer.num_units} units and gate={layer.gate!r}: under the soft "
                    "gate nothing grows, so that all units of all layers must be there at first; give sparsify() explore=math.inf "
                    "and gate='soft' for all layers"
                )
            if layer.num_active > layer.num_final and not self.update_steps:
                raise ValueError(
                    f"layer {name} starts with {layer.num_active} units and is to keep {layer.num_final}, but no update comes: "
                    f"method={self.settings.method!r}, every={self.settings.every}, until * total_steps={self.settings.last_step}"
                )

    def _prepare(self) -> None:
        """What the coming step needs: the soft gate's temperature, and measuring when it is an update step."""
        coming = self.steps + 1
        if coming in self.update_steps:
            self._due = True
        self._signal.stop()
        if self._due and self._measures:
            assert self._editor is not None
            fraction = policy.cosine_drop_fraction(self.settings.first_drop_fraction, coming, self.settings.last_step)
            self._movable = permutation.movable_positions(self._ordered, fraction, self._editor, self._ranks)
            self._signal.start({name: chosen.positions for name, chosen in self._movable.items()})
        self.set_temperature(coming)

    def _layouts(self) -> dict[str, Tensor]:
        layouts = {name: layer.layout for name, layer in self.layers.items()}
        orders = {f"{name} (order)": layer.order for name, layer in self._ordered.items() if layer.order is not None}
        return {**layouts, **orders}

    def _reorder(self, gains: dict[str, Tensor]) -> dict[str, int]:
        """gains: this rank's share. Returns how many inputs of each layer moved."""
        assert self._editor is not None
        if not self._ordered:
            return {}
        pieces = [gains[name] for name in self._ordered]
        whole = self._ranks.sum_(torch.cat([piece.flatten() for piece in pieces])).cpu()
        moved = {}
        for (name, layer), piece, total in zip(
            self._ordered.items(), pieces, whole.split([piece.numel() for piece in pieces]), strict=True
        ):
            moved[name] = permutation.reorder(
                layer, self._movable[name], total.view_as(piece), self._editor, self.settings.cold_start
            )
        return moved

    def _update(self) -> TopologyUpdate:
        assert self._editor is not None
        started = time.perf_counter()
        self._require_equal(f"before the topology update at step {self.steps}")
        fraction = policy.cosine_drop_fraction(self.settings.first_drop_fraction, self.steps, self.settings.last_step)
        measured = self._signal.take()
        updates = []
        for index, (name, scores) in enumerate(
            gather(self.layers, self._editor, self._ranks, measured.scores, self.steps).items()
        ):
            layer, history = self.layers[name], self._history[name]
            result = update_layer(layer, scores, self._spec(index, layer, fraction), self._editor)
            history.change(result.dropped, result.grown, self.steps)
            updates.append(describe(name, layer, result, history, self.steps))
        moved = self._reorder(measured.gains)
        self.updates += 1
        self._require_equal(f"after the topology update at step {self.steps}")
        seconds = time.perf_counter() - started
        told = tuple(replace(update, moved=moved.get(update.name)) for update in updates)
        return TopologyUpdate(self.steps, self.updates, fraction, seconds, self.digest(), told)

    def _spec(self, index: int, layer: SparseLayer, fraction: float) -> UpdateSpec:
        assert self._method is not None
        final = layer.num_final // layer.num_groups
        last = self.steps >= self.update_steps[-1]  # skipped steps may have delayed it
        if self._soft:
            grow, keep = 0, final if last else layer.num_active
        else:
            keep = final if last else self._kept(layer, self.steps)
            if self._method.choose is None:  # a layer that was trained before has no surplus left
                keep = min(keep, layer.num_active // layer.num_groups)
            absent = (layer.num_units - layer.num_active) // layer.num_groups
            grow = min(round(fraction * keep), absent)
        progress = 1.0 if last else self.steps / self.settings.last_step
        key = (self.settings.seed, index, self.updates)
        return UpdateSpec(self._method, self.settings, grow, keep, fraction, progress, key)

    def _kept(self, layer: SparseLayer, step: int) -> int:
        """Active units of a group after an update at `step`."""
        start, final = layer.num_start // layer.num_groups, layer.num_final // layer.num_groups
        return policy.active_count(start, final, step, self.settings.last_step)
