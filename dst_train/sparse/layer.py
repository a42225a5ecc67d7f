"""SparseLayer: what topology knows of a sparse layer, whatever its pattern."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor, int], Tensor]
Watch = Callable[[Tensor, Tensor], None]


class SparseLayer(nn.Module, ABC):
    """A linear layer of whose weight [out_features, in_features] some *units* are present.

    A pattern partitions the entries of the weight into `num_units` units of `unit_entries` entries, and the units into
    `num_groups` groups of equal size in order: unit u is in group u // (num_units / num_groups). All groups hold equally many
    active units, but for those that a method empties (`srigl`). A *slot* is a place of the stored parameter that holds one unit or none.

    Attributes:
        pattern: the name by which rules know it.
        num_start, num_final: active units at first, and when the topology is settled; all groups together.
        bias: Parameter [out_features] or None.
        alpha: Parameter [num_units], the learned importance of each unit, or None.
        gate: how alpha acts, see `DiagonalLinear`.
        temperature: of the soft gate.
        replaced: the class of the dense layer in whose place it is, which `densify` puts back.
        watch: called with the input and the output of each forward pass, while set. A forward hook would do, but torch.compile
            does not see hooks that come after a model's first call.
    """

    in_features: int
    out_features: int
    pattern: str
    num_units: int
    num_groups: int = 1
    unit_entries: int
    num_start: int
    num_final: int
    bias: nn.Parameter | None
    alpha: nn.Parameter | None
    gate: str | None = None
    temperature: float = 1.0
    replaced: type[nn.Module] = nn.Linear
    watch: Watch | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        y = self.product(x)
        if self.watch is not None:
            self.watch(x, y)
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not watched: what they do would be counted as what this layer does."""
        return {key: value for key, value in self.__dict__.items() if key != "watch"}

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """`forward`, unwatched."""

    @property
    @abstractmethod
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight."""

    @abstractmethod
    def units(self) -> Tensor:
        """int64 [slots]: the unit in each slot, -1 in a free one.

        On the device on which an update is to choose: the CPU where units are few, that of the layer where they are many.
        """

    @property
    @abstractmethod
    def layout(self) -> Tensor:
        """The buffer that says which units are active: what all ranks must have alike."""

    @abstractmethod
    def replace(self, dropped: Tensor, grown: Tensor) -> Tensor:
        """Free the slots of the units `dropped` and place the units `grown` (int64) in free ones; returns all slots touched.

        Only the bookkeeping: the entries of these slots are to be reset by the caller.
        """

    @abstractmethod
    def slot_of(self, element: Tensor) -> Tensor:
        """The slot to which flat elements of `stored` belong; int64 -> int64."""

    @abstractmethod
    def elements(self, slots: Tensor) -> Tensor:
        """int64: the flat elements of `stored` that belong to slots, on the device of `units`."""

    @abstractmethod
    def unit_scores(self, x: Tensor, dy: Tensor, reduce: Reduce | None) -> Tensor:
        """Mean over the entries of each unit, present or not, of |dL/dW|, float32 [num_units].

        x: [tokens, in_features], after `arrange`; dy: [tokens, out_features]. reduce(block, first_column) is
        applied to each block of columns of dL/dW before the absolute value.
        """

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The weight as a dense [out_features, in_features] tensor, for inspection and export."""

    def arrange(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the order in which the units see the inputs."""
        return x

    @property
    def num_active(self) -> int:
        return int((self.units() >= 0).sum())

    @property
    def final_density(self) -> float:
        """Share of the dense weight's entries that are present when the topology is settled."""
        return self.num_final / self.num_units

    def gates(self, alpha: Tensor, active: Tensor) -> Tensor:
        """The factors by which alpha [num_units] weighs the active units (int64 [k]), float32 [k].

        DynaDiag, arXiv 2506.11449, equation 5: min(1, K softmax(alpha / T)). The straight-through gate is not clipped: the
        weight is multiplied by 1, and only the gradient of alpha sees the factors.
        """
        chosen = alpha.float()[active]
        if self.gate == "soft" and active.numel() <= self.num_final:
            # As in the paper's released code, what stays is multiplied by exactly 1 from then on. Alpha keeps a gradient, of
            # zero: ZeRO 3 would count the last one it had in every later step.
            return 0.0 * chosen + 1.0
        share = torch.softmax(chosen / self.temperature, 0)
        return (self.num_final * share).clamp(max=1.0) if self.gate == "soft" else active.numel() * share


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator that the key alone determines, and whose stream is no other's.

    Seeds that are small numbers are in use already: what torch.manual_seed(0) initialises and what a generator of seed 0 chooses
    would be the same numbers.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError for what is no share of absent weights."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")


def count_active(density: float, units_per_group: int) -> int:
    """Active units of a group: the nearest to the density, at least one."""
    return min(units_per_group, max(1, round(density * units_per_group)))
