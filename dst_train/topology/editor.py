"""Reading and editing rows of a parameter together with its optimiser state, wherever they live."""

from __future__ import annotations

from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# State tensors of the parameter's shape, by what a regrown row gets. Others are refused: resetting them by guess corrupts training.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq",)


class ParameterEditor(Protocol):
    """Rows are those of the whole 2-D parameter, also when a rank owns only a part of it."""

    def check(self, name: str, parameter: nn.Parameter) -> None:
        """Raise ValueError if the parameter is not optimised."""

    def row_sums(self, parameter: nn.Parameter) -> Tensor:
        """This rank's share of [2, rows] float64: row sums of |value| and of the second moment; ranks sum to the whole."""

    def reset_rows(self, parameter: nn.Parameter, rows: Tensor, second_moment: float) -> None:
        """Rows (int64 [r], CPU) become 0 in every copy of the value, 0 in first and `second_moment` in second moments.

        All ranks call it with the same arguments. All other rows stay bit for bit what they are.
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
        if not any(parameter is p for group in self._optimizer.param_groups for p in group["params"]):
            raise ValueError(f"{name} is not among the optimiser's parameters; create the optimiser after sparsify()")

    def row_sums(self, parameter: nn.Parameter) -> Tensor:
        state = row_state(self._optimizer.state.get(parameter, {}), parameter.numel())
        return row_sums(parameter.detach(), state, 0, parameter.shape[0], parameter.shape[1]) / self._world_size

    @torch.no_grad()
    def reset_rows(self, parameter: nn.Parameter, rows: Tensor, second_moment: float) -> None:
        rows = rows.to(parameter.device)
        parameter[rows] = 0
        for key, tensor in row_state(self._optimizer.state.get(parameter, {}), parameter.numel()).items():
            tensor[rows] = second_moment if key in SECOND_MOMENTS else 0.0


def row_state(state: dict[str, Any], numel: int) -> dict[str, Tensor]:
    """The entries of an optimiser state that hold one number per element.

    Raises:
        ValueError: such an entry that is neither a known first nor second moment.
    """
    found = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() != numel or value.dim() == 0:
            continue
        if key not in FIRST_MOMENTS + SECOND_MOMENTS:
            raise ValueError(
                f"optimiser state {key!r} is not known to topology updates (known: "
                f"{', '.join(FIRST_MOMENTS + SECOND_MOMENTS)}); use AdamW or SGD"
            )
        found[key] = value
    return found


@torch.no_grad()
def row_sums(values: Tensor, state: dict[str, Tensor], start: int, rows: int, length: int) -> Tensor:
    """Row sums [2, rows] in float64 of a piece that begins at flat element `start` of a [rows, length] parameter."""
    row = (torch.arange(values.numel(), device=values.device) + start) // length
    sums = torch.zeros(2, rows, dtype=torch.float64, device=values.device)
    sums[0].index_add_(0, row, values.reshape(-1).double().abs())
    for key in SECOND_MOMENTS:
        if key in state:
            sums[1].index_add_(0, row, state[key].reshape(-1).double())
    return sums
