"""Elements of a parameter under ZeRO 0 to 3: fp32 master, the copy that the forward pass reads, and optimiser state.

DeepSpeed 0.19's `safe_set_full_*` helpers leave the low-precision copy stale until the next step (stages 1, 2), raise on
some ranks when a parameter does not divide by the world size (stage 3) and do nothing at stage 0; this module edits the
piece that each rank owns instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from dst_train.topology.editor import SlotOf, editor_for, element_state, require_trainable, slot_sums, write_elements


class Place(NamedTuple):
    """Where a rank's flat tensors hold what it owns of a parameter: `numel` elements from `start` of the parameter on lie from
    `offset` on in those of `group`, masters and optimiser state alike. For ZeRO 1 to 3."""

    group: int
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class Piece:
    """What this rank owns of a parameter: flat elements from `start` on. The tensors are views; writes reach DeepSpeed."""

    start: int
    master: Tensor
    state: dict[str, Tensor]


class DeepSpeedEditor:
    """A `dst_train.topology.ParameterEditor` over a DeepSpeed engine.

    Call it between `engine.step()` and the next forward pass.

    Raises:
        ValueError: bf16 or fp16 at stage 0, whose wrapper keeps masters out of reach.
    """

    def __init__(self, engine: DeepSpeedEngine, world_size: int) -> None:
        self._engine = engine
        self._stage = engine.zero_optimization_stage()
        self._world_size = world_size
        if self._stage == 0 and not isinstance(engine.optimizer, torch.optim.Optimizer):
            raise ValueError(
                "ZeRO stage 0 with bf16 or fp16 parameters is not supported; use stage 1, 2 or 3, or autocast"
            )

    def check(self, name: str, parameter: nn.Parameter) -> None:
        require_trainable(name, parameter)
        optimizer = self._engine.optimizer
        if self._stage == 0:
            optimised = any(parameter is p for g in self._engine.basic_optimizer.param_groups for p in g["params"])
        elif self._stage == 3:
            optimised = optimizer.get_param_id(parameter) in optimizer.grad_position
        else:
            optimised = hasattr(parameter, "_hp_mapping")
        if not optimised:
            raise ValueError(f"{name} is not among the optimiser's parameters; create the optimiser after sparsify()")

    def sums(self, parameter: nn.Parameter, slot_of: SlotOf, num_slots: int) -> Tensor:
        piece = self.piece(parameter)
        if piece is None:
            return torch.zeros(3, num_slots, dtype=torch.float64, device=parameter.device)
        sums = slot_sums(piece.master, piece.state, piece.start, slot_of, num_slots)
        return sums.div_(self._world_size) if self._stage == 0 else sums

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, elements: Tensor, value: float | Tensor, second_moment: float) -> None:
        piece = self.piece(parameter)
        if piece is not None:
            local = elements - piece.start
            mine = (local >= 0) & (local < piece.master.numel())
            part = value[mine] if isinstance(value, Tensor) else value
            write_elements(piece.master, piece.state, local[mine], part, second_moment)
        if self._stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                write_elements(parameter.data, {}, elements, value, second_moment)
        elif self._stage in (1, 2):
            write_elements(parameter.data, {}, elements, value, second_moment)  # a view into DeepSpeed's flat buffer

    def piece(self, parameter: nn.Parameter) -> Piece | None:
        """What this rank owns of the parameter, or None when it owns nothing of it."""
        if self._stage == 0:
            state = element_state(self._engine.optimizer.state.get(parameter, {}), parameter.numel())
            return Piece(0, parameter.data.view(-1), {k: v.view(-1) for k, v in state.items()})
        place = self.place(parameter)
        if place is None:
            return None
        flat = self.flat_masters[place.group]
        # Not DeepSpeed's own links to the state: they are made after the first step of the first group, when later groups have none.
        state = element_state(self.state.get(flat, {}), flat.numel())
        here = (place.offset, place.numel)
        return Piece(place.start, flat.narrow(0, *here), {k: v.narrow(0, *here) for k, v in state.items()})

    @property
    def flat_masters(self) -> list[Tensor]:
        """What this rank owns, by group: flat, with padding. For ZeRO 1 to 3."""
        optimizer = self._engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """Optimiser state of ZeRO 1 to 3 by flat master tensor; empty before the first step."""
        return self._engine.optimizer.optimizer.state

    def refresh(self) -> None:
        """What the forward pass reads follows the masters, as after a step. For ZeRO 1 to 3; collective."""
        optimizer = self._engine.optimizer
        if self._stage < 3:
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()
        for group in range(len(self.flat_masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()

    def place(self, parameter: nn.Parameter) -> Place | None:
        """Where this rank has what it owns of the parameter, or None when it owns nothing of it. For ZeRO 1 to 3."""
        if self._stage == 3:
            return self._partition(parameter)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        held, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Place(mapping.param_group_index, held.start, whole.start, held.numel)

    def _partition(self, parameter: nn.Parameter) -> Place | None:
        optimizer = self._engine.optimizer
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]  # padded: equal on all ranks
        start = size * optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        return Place(group, offset, start, numel) if numel > 0 else None


@editor_for.register
def _(target: DeepSpeedEngine, world_size: int = 1) -> DeepSpeedEditor:
    return DeepSpeedEditor(target, world_size)
