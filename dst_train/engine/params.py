"""Rows of a parameter under ZeRO 0 to 3: fp32 master, the copy that the forward pass reads, and optimiser state.

DeepSpeed 0.19's `safe_set_full_*` helpers leave the low-precision copy stale until the next step (stages 1, 2), raise on
some ranks when a parameter does not divide by the world size (stage 3) and do nothing at stage 0; this module edits the
piece that each rank owns instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from dst_train.topology.editor import SECOND_MOMENTS, editor_for, row_state, row_sums


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
        groups = self._engine.basic_optimizer.param_groups if self._stage == 0 else None
        if not parameter.requires_grad or (
            groups is not None and not any(parameter is p for group in groups for p in group["params"])
        ):
            raise ValueError(f"{name} is not among the optimiser's parameters; create the optimiser after sparsify()")

    def row_sums(self, parameter: nn.Parameter) -> Tensor:
        rows, length = self.shape(parameter)
        piece = self.piece(parameter)
        if piece is None:
            return torch.zeros(2, rows, dtype=torch.float64, device=parameter.device)
        sums = row_sums(piece.master, piece.state, piece.start, rows, length)
        return sums / self._world_size if self._stage == 0 else sums

    @torch.no_grad()
    def reset_rows(self, parameter: nn.Parameter, rows: Tensor, second_moment: float) -> None:
        _, length = self.shape(parameter)
        piece = self.piece(parameter)
        if piece is not None:
            flat = (rows[:, None] * length + torch.arange(length)).flatten() - piece.start
            mine = flat[(flat >= 0) & (flat < piece.master.numel())].to(piece.master.device)
            piece.master[mine] = 0
            for key, tensor in piece.state.items():
                tensor[mine] = second_moment if key in SECOND_MOMENTS else 0.0
        if self._stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data[rows.to(parameter.device)] = 0
        elif self._stage in (1, 2):
            parameter.data[rows.to(parameter.device)] = 0  # in place: the data is a view into DeepSpeed's flat buffer

    def shape(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The whole parameter's shape; under ZeRO 3 `parameter.shape` is empty between steps."""
        rows, length = getattr(parameter, "ds_shape", parameter.shape)
        return rows, length

    def piece(self, parameter: nn.Parameter) -> Piece | None:
        """What this rank owns of the parameter, or None when it owns nothing of it."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            state = row_state(optimizer.state.get(parameter, {}), parameter.numel())
            return Piece(0, parameter.data.view(-1), {k: v.view(-1) for k, v in state.items()})
        if self._stage in (1, 2):
            return self._fragment(parameter)
        return self._partition(parameter, optimizer)

    @staticmethod
    def _fragment(parameter: nn.Parameter) -> Piece | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        master = mapping.hp_fragment
        state = row_state(mapping.optim_fragment or {}, master.numel())
        return Piece(mapping.lp_fragment_address.start, master, state)

    @staticmethod
    def _partition(parameter: nn.Parameter, optimizer: Any) -> Piece | None:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]  # padded: equal on all ranks
        start = size * optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if numel <= 0:
            return None
        flat = optimizer.fp32_partitioned_groups_flat[group]
        state = row_state(optimizer.optimizer.state.get(flat, {}), flat.numel())
        return Piece(start, flat.narrow(0, offset, numel), {k: v.narrow(0, offset, numel) for k, v in state.items()})


@editor_for.register
def _(target: DeepSpeedEngine, world_size: int = 1) -> DeepSpeedEditor:
    return DeepSpeedEditor(target, world_size)
