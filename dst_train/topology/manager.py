"""Topology: prunes and regrows the units of a model's sparse layers, equally on every rank."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dst_train.sparse import DiagonalLinear, SparseLayer, sparse_layers
from dst_train.topology import chase, permutation, policy, telemetry
from dst_train.topology.editor import ParameterEditor, editor_for
from dst_train.topology.growth import GrowthSignal
from dst_train.topology.methods import METHODS, SOFT, Change
from dst_train.topology.ranks import Ranks
from dst_train.topology.update import TopologyUpdate, change_layer, describe, gather

GROW_SIGNALS = ("exact", "local")
COLD_STARTS = ("mean", "zero")


class Topology:
    """Dynamic sparse training of the sparse layers of `model`.

    Call `bind` once the optimiser exists and `step` after every optimiser step, on all ranks. An update drops the active
    units with the lowest scores and grows as many absent ones: see `METHODS`. Regrown values and first moments are 0. Dropped
    units do not regrow in the same update. A layer with more active units than are to stay (`explore`) drops the surplus over
    the first updates, by cosine. Layers with a permutation are reordered in the same updates: see
    `dst_train.topology.permutation`.

    Args:
        method: `static` (no updates), `set` (Mocanu et al. 2018): drops the smallest mean |value|, grows at random; `rigl`
            (Evci et al. 2020): grows the largest gradient; `mest` (Yuan et al. 2021, arXiv 2110.14032): drops the smallest
            |value| + gradient_weight * |gradient|, grows at random (its released code has a gradient_weight of 0 by
            default, which is `set`); `cht` and `chts` (arXiv 2501.19107), `srigl` (arXiv 2305.02299), `chase` (arXiv 2305.19454): see their
            modules; `dynadiag` (arXiv 2506.11449, changed as docs/architecture.md says): by learned importance,
            needs `sparsify(..., gate="straight_through")`, or `gate="soft", explore=inf` for the paper's released code.
        total_steps: optimiser steps of the whole training; updates happen every `every` steps before `until * total_steps`.
        drop_fraction: share of the active units replaced at first, decayed by cosine.
        grow_signal: see `GrowthSignal`; `mest` and `dynadiag` take |gradient| from it.
        gradient_weight: of `mest`, at least 0.
        cold_start: second moment of regrown units. `mean`: of the layer's surviving units. `zero`: Adam's step counter is
            shared, so that their first steps are up to three times as long (SMET, arXiv 2606.00888).
        gamma_sal: of `srigl`, in [0, 1]; 0 switches ablation off.
        channel_sparsity: of `chase`, the share of outputs without any weight after the last update, in [0, 1).
        temperature: (start, end) of the soft gate, by cosine until `until * total_steps`.
        seed: random growth is a pure function of (seed, layer, update number).
        accumulation: micro-batches (backward passes) per optimiser step.

    Raises:
        ValueError: an argument out of range, a model without sparse layers (unless static), layers whose gates do not fit
            the method, a pattern that the method is not for, more units than are to stay when there is no update to drop
            them, or a permutation that no update changes.
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
        cold_start: str = "mean",
        gamma_sal: float = 0.3,
        channel_sparsity: float = 0.5,
        temperature: tuple[float, float] = (5.0, 0.05),
        seed: int = 0,
        accumulation: int = 1,
    ) -> None:
        if method not in ("static", *METHODS):
            raise ValueError(f"method={method!r}: choose one of static, {', '.join(METHODS)}")
        if grow_signal not in GROW_SIGNALS:
            raise ValueError(f"grow_signal={grow_signal!r}: choose one of {', '.join(GROW_SIGNALS)}")
        if cold_start not in COLD_STARTS:
            raise ValueError(f"cold_start={cold_start!r}: choose one of {', '.join(COLD_STARTS)}")
        for name, value in (("total_steps", total_steps), ("every", every), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name, share in (("until", until), ("drop_fraction", drop_fraction)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{name}={share}: must be in (0, 1]")
        if not gradient_weight >= 0.0:
            raise ValueError(f"gradient_weight={gradient_weight}: must be at least 0")
        if not 0.0 <= gamma_sal <= 1.0:
            raise ValueError(f"gamma_sal={gamma_sal}: must be in [0, 1]")
        if not 0.0 <= channel_sparsity < 1.0:
            raise ValueError(f"channel_sparsity={channel_sparsity}: must be in [0, 1)")
        if not min(temperature) > 0.0:
            raise ValueError(f"temperature={temperature}: both must be above 0")
        self.layers: dict[str, SparseLayer] = sparse_layers(model)
        if not self.layers and method != "static":
            raise ValueError(
                "the model has no sparse layers; call sparsify() first, or use method='static' "
                "(also for the patterns sr_ste, butterfly and sdgp alone, which have no topology to update)"
            )
        self.method = method
        self.every = every
        self.last_step = int(until * total_steps)
        self.drop_fraction = drop_fraction
        self.gradient_weight = gradient_weight
        self.cold_start = cold_start
        self.gamma_sal = gamma_sal
        self.channel_sparsity = channel_sparsity
        self.temperature = temperature
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
        self._ordered = {
            name: layer
            for name, layer in self.layers.items()
            if isinstance(layer, DiagonalLinear) and layer.order is not None
        }
        self._weakest: dict[str, permutation.Weakest] = {}
        self._soft = any(layer.gate == "soft" for layer in self.layers.values())
        self._method = SOFT if self._soft else METHODS.get(method)
        self._check_layers()

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
            for key, parameter in (("weight", layer.stored), ("alpha", layer.alpha)):
                if parameter is not None:
                    self._editor.check(f"{name} ({key})", parameter)
        held = self._held()
        self._require_equal("at the start")
        self._history = {
            name: telemetry.History(units[units >= 0], self.layers[name].num_units) for name, units in held.items()
        }
        self._prepare()
        return self

    def close(self) -> None:
        """Free the process group of a bound topology, for a process that goes on to another. Collective."""
        self._require_bound("close")
        self._ranks.close()

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
        self._prepare()

    def digest(self) -> str:
        """sha256 over the units of all layers, by slot, and the orders of their inputs."""
        total = hashlib.sha256()
        for name, tensor in {**self._held(), **self._orders()}.items():
            total.update(name.encode() + tensor.numpy().tobytes())
        return total.hexdigest()

    def _require_bound(self, method: str) -> None:
        if self._editor is None:
            raise RuntimeError(f"Topology.{method}() before bind(): bind it to the optimiser or the engine first")

    def _require_equal(self, moment: str) -> None:
        self._ranks.require_equal({**self._held(), **self._orders()}, moment)

    def _check_layers(self) -> None:
        if self._ordered and self._method is None:
            raise ValueError(
                f"layer {next(iter(self._ordered))} has a permutation, which method='static' never changes"
            )
        gated = self.method == "dynadiag"
        patterns = self._method.patterns if self._method is not None else ()
        for name, layer in self.layers.items():
            if patterns and layer.pattern not in patterns:
                raise ValueError(
                    f"layer {name} has pattern={layer.pattern!r} and method={self.method!r} is for {', '.join(patterns)}; "
                    "change the layer's rule, or the method"
                )
            if gated != (layer.gate is not None):
                needs = "needs" if gated else "does not take"
                raise ValueError(
                    f"layer {name} has gate={layer.gate!r} and method={self.method!r} {needs} gates; give sparsify() "
                    "gate='straight_through' for dynadiag, and no gate for other methods"
                )
            if layer.num_start > layer.num_final and (self._method is None or self.every >= self.last_step):
                raise ValueError(
                    f"layer {name} starts with {layer.num_start} units and is to keep {layer.num_final}, but no update comes: "
                    f"method={self.method!r}, every={self.every}, until * total_steps={self.last_step}"
                )

    def _prepare(self) -> None:
        """What the coming step needs: the soft gate's temperature, and measuring when it is an update step."""
        coming = self.steps + 1
        if self._method is not None and coming % self.every == 0 and coming < self.last_step:
            self._due = True
        self._signal.stop()
        if self._due and self._method is not None and (self._method.measures or self._ordered):
            assert self._editor is not None
            fraction = policy.cosine_drop_fraction(self.drop_fraction, coming, self.last_step)
            self._weakest = {
                name: permutation.weakest(layer, fraction, self._editor, self._ranks)
                for name, layer in self._ordered.items()
            }
            self._signal.start({name: chosen.positions for name, chosen in self._weakest.items()})
        if self._soft:
            temperature = policy.temperature(*self.temperature, coming, self.last_step)
            for layer in self.layers.values():
                layer.temperature = temperature
                # As in the paper's released code: what stays is multiplied by exactly 1 from then on.
                layer.gate = "soft" if layer.num_active > layer.num_final else None

    def _held(self) -> dict[str, Tensor]:
        return {name: layer.units() for name, layer in self.layers.items()}

    def _orders(self) -> dict[str, Tensor]:
        return {
            f"{name} (order)": layer.order.cpu() for name, layer in self._ordered.items() if layer.order is not None
        }

    def _reorder(self, gains: dict[str, Tensor]) -> dict[str, int]:
        """gains: this rank's share. Returns how many inputs of each layer moved."""
        assert self._editor is not None
        return {
            name: permutation.reorder(layer, self._weakest[name], self._ranks.sum_(gains[name]).cpu(), self._editor)
            for name, layer in self._ordered.items()
        }

    def _update(self) -> TopologyUpdate:
        assert self._editor is not None
        started = time.perf_counter()
        self._require_equal(f"before the topology update at step {self.steps}")
        fraction = policy.cosine_drop_fraction(self.drop_fraction, self.steps, self.last_step)
        gains = self._signal.take_gains()
        gradients = self._signal.take() if self._signal.active else {}
        changes = []
        for index, (name, scores) in enumerate(
            gather(self.layers, self._editor, self._ranks, gradients, self.steps).items()
        ):
            layer, history = self.layers[name], self._history[name]
            changed = change_layer(layer, scores, self._change(index, layer, fraction), self._editor)
            history.change(changed.dropped, changed.grown, self.steps)
            changes.append(describe(name, layer, changed, history, self.steps))
        moved = self._reorder(gains)
        self.updates += 1
        self._require_equal(f"after the topology update at step {self.steps}")
        seconds = time.perf_counter() - started
        told = tuple(replace(change, moved=moved.get(change.name)) for change in changes)
        return TopologyUpdate(self.steps, self.updates, fraction, seconds, self.digest(), told)

    def _change(self, index: int, layer: SparseLayer, fraction: float) -> Change:
        assert self._method is not None
        start, final = layer.num_start // layer.num_groups, layer.num_final // layer.num_groups
        last = self.steps + self.every >= self.last_step
        if self._soft:
            grow, keep = 0, final if last else layer.num_active
        else:
            keep = final if last else policy.active_count(start, final, self.steps, self.last_step)
            absent = (layer.num_units - layer.num_active) // layer.num_groups
            grow = min(round(fraction * keep), absent)
        progress = 1.0 if last else self.steps / self.last_step
        empty = chase.removed_rows(self.channel_sparsity, layer.out_features, progress)
        key = (self.seed, index, self.updates)
        return Change(
            self._method,
            grow,
            keep,
            fraction,
            progress,
            self.gradient_weight,
            self.gamma_sal,
            empty,
            self.cold_start,
            key,
        )
