"""Reading and editing elements of a parameter together with its optimiser state, wherever they live."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# State tensors of the parameter's shape, by what a regrown unit gets. Others are refused: resetting them by guess corrupts training.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq",)


SlotOf = Callable[[Tensor], Tensor]


class ParameterEditor(Protocol):
    """Elements are flat positions in the whole parameter, also when a rank owns only a part of it."""

    def check(self, name: str, parameter: nn.Parameter) -> None:
        """Raise ValueError if the parameter is not optimised, or is frozen."""

    def sums(self, parameter: nn.Parameter, slot_of: SlotOf, num_slots: int) -> Tensor:
        """This rank's share of [3, num_slots] float64: sums over each slot's elements of the value, of |value| and of the
        second moment; the shares of all ranks sum to the whole. slot_of: flat elements, int64 -> their slots."""

    def write(self, parameter: nn.Parameter, elements: Tensor, value: float | Tensor, second_moment: float) -> None:
        """Elements (int64 [e], on any device) get `value` (one for all, or [e]) in every copy, first moments 0, and `second_moment`.

        All ranks call it with the same arguments. All other elements stay bit for bit what they are.
        """


@singledispatch
def editor_for(target: Any, world_size: int = 1) -> ParameterEditor:
    """The editor for a torch optimiser; `dst_train.engine.params` adds DeepSpeed engines when it is imported."""
    raise TypeError(
        f"cannot bind a topology to {type(target).__name__}: give a torch.optim.Optimizer, or a DeepSpeed engine after "
        "`import dst_train.engine.params`"
    )


@editor_for.register
def _(target: torch.optim.Optimizer, world_size: int = 1) -> ParameterEditor:
    return TorchEditor(target, world_size)


class TorchEditor:
    """Parameters and optimiser state are whole and equal on every rank (one process, DDP)."""

    def __init__(self, optimizer: torch.optim.Optimizer, world_size: int = 1) -> None:
        self._optimizer = optimizer
        self._world_size = world_size

    def check(self, name: str, parameter: nn.Parameter) -> None:
        require_trainable(name, parameter)
        if not any(parameter is p for group in self._optimizer.param_groups for p in group["params"]):
            raise ValueError(f"{name} is not among the optimiser's parameters; create the optimiser after sparsify()")

    def sums(self, parameter: nn.Parameter, slot_of: SlotOf, num_slots: int) -> Tensor:
        state = element_state(self._optimizer.state.get(parameter, {}), parameter.numel())
        return slot_sums(parameter.detach(), state, 0, slot_of, num_slots).div_(self._world_size)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, elements: Tensor, value: float | Tensor, second_moment: float) -> None:
        state = element_state(self._optimizer.state.get(parameter, {}), parameter.numel())
        write_elements(parameter, {k: v.view(-1) for k, v in state.items()}, elements, value, second_moment)


def require_trainable(name: str, parameter: nn.Parameter) -> None:
    if not parameter.requires_grad:
        raise ValueError(
            f"{name} is frozen (requires_grad is False): what grows there would never learn; keep it dense"
        )


def element_state(state: dict[str, Any], numel: int) -> dict[str, Tensor]:
    """The entries of an optimiser state that hold one number per element.

    Raises:
        ValueError: a tensor that is neither a known first nor second moment; a single number, such as the step, may be there.
    """
    found = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or (value.numel() == 1 and numel != 1):
            continue
        if value.numel() != numel or key not in FIRST_MOMENTS + SECOND_MOMENTS:
            raise ValueError(
                f"optimiser state {key!r} is not known to topology updates (known: "
                f"{', '.join(FIRST_MOMENTS + SECOND_MOMENTS)}); use AdamW or SGD"
            )
        found[key] = value
    return found


@torch.no_grad()
def slot_sums(values: Tensor, state: dict[str, Tensor], start: int, slot_of: SlotOf, num_slots: int) -> Tensor:
    """Sums [3, num_slots] in float64, as `ParameterEditor.sums`, of a piece that begins at flat element `start`."""
    slot = slot_of(torch.arange(values.numel(), device=values.device) + start)
    flat = values.reshape(-1).double()
    sums = torch.zeros(3, num_slots, dtype=torch.float64, device=values.device)
    sums[0].index_add_(0, slot, flat)
    sums[1].index_add_(0, slot, flat.abs())
    for key in SECOND_MOMENTS:
        if key in state:
            sums[2].index_add_(0, slot, state[key].reshape(-1).double())
    return sums


@torch.no_grad()
def write_elements(
    values: Tensor, state: dict[str, Tensor], elements: Tensor, value: float | Tensor, second_moment: float
) -> None:
    """Set the values and second moments of `elements` of one shard, and its first moments to 0. state: flat views."""
    elements = elements.to(values.device)
    values.view(-1)[elements] = value.to(values) if isinstance(value, Tensor) else value
    for key, tensor in state.items():
        tensor[elements] = second_moment if key in SECOND_MOMENTS else 0.0
