"""DiagonalLinear: a linear layer whose weight is a sum of K pseudo-diagonals, stored as K rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import dst_ops
from dst_train.sparse.layer import Reduce, SparseLayer, check_sparsity, count_active
from dst_train.sparse.low_rank import LowRank

GATES = ("straight_through", "soft")


class DiagonalLinear(SparseLayer):
    """`y = x W^T + b` with a diagonally sparse W of shape [out_features, in_features]; W itself is never stored.

    With a permutation, `y = x[order] W^T + b`: W is diagonal in positions, and an input may stand at any of them.

    With P = max(out_features, in_features) candidate diagonals of length L = min(...), a *unit* is `band` adjacent
    candidates. `num_final` of the `num_units` = P / band units stay (DynaDiag, arXiv 2506.11449, section 3).

    Attributes:
        values: Parameter [slots * band, L]; rows `s * band ... (s + 1) * band - 1` belong to slot s. Free slots hold zeros.
        offsets: int32 buffer [slots]; the unit held by slot s, -1 for none. Its order has no meaning; units do not repeat.
        order: with a permutation, int32 buffer [in_features]: the input at each position; else None.
        bias: Parameter [out_features] or None.
        alpha: with a gate, Parameter [num_units], zeros at first.
        low_rank: with a rank, a path that is added to the product while it is active.

    Args:
        sparsity: share of absent weights, in [0, 1); at least one unit stays.
        band: adjacent diagonals per unit; must divide P.
        explore: active units at first, as a multiple of `num_final`; inf for all. There are as many slots.
        gate: `straight_through`: alpha receives the gradient of factors K softmax(alpha) of the active units, the weight
            is multiplied by 1. `soft`: the weight is multiplied by min(1, K softmax(alpha / temperature)). None: no alpha.
        permute: whether there is a permutation, the identity at first; `Topology` changes it.
        rank: of the low-rank path; 0 for none.
        generator: CPU generator that draws the first offsets and what of the path is random; the global one when None.

    Raises:
        ValueError: a size below 1, sparsity outside [0, 1), explore below 1, an unknown gate, a band that does not divide P,
            or a rank that `LowRank` refuses.
    """

    offsets: Tensor
    pattern = "diagonal"
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        band: int = 1,
        bias: bool = True,
        explore: float = 1.0,
        gate: str | None = None,
        permute: bool = False,
        rank: int = 0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        candidates = max(in_features, out_features)
        if min(in_features, out_features) < 1:
            raise ValueError(f"in_features={in_features}, out_features={out_features}: both must be at least 1")
        check_sparsity(sparsity)
        if band < 1 or candidates % band:
            raise ValueError(f"band={band}: must divide max(in_features, out_features)={candidates}")
        if not explore >= 1.0:
            raise ValueError(f"explore={explore}: must be at least 1")
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate={gate!r}: choose one of {', '.join(GATES)}, or None")
        self.in_features = in_features
        self.out_features = out_features
        self.band = band
        self.length = min(in_features, out_features)
        self.num_units = candidates // band
        self.unit_entries = band * self.length
        self.num_final = count_active(1.0 - sparsity, self.num_units)
        self.num_start = round(min(explore * self.num_final, float(self.num_units)))
        device = torch.get_default_device() if device is None else device
        drawn = torch.randperm(self.num_units, generator=generator, device="cpu")
        offsets = drawn[: self.num_start].sort().values
        self.register_buffer("offsets", offsets.to(device=device, dtype=torch.int32))
        self.register_buffer("order", torch.arange(in_features, dtype=torch.int32, device=device) if permute else None)
        self._occupied: Tensor | None
        self.register_buffer("_occupied", None, persistent=False)
        self.register_load_state_dict_post_hook(_refresh_occupied)
        self.values = nn.Parameter(torch.empty(self.num_start * band, self.length, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.gate = gate
        self.alpha = None if gate is None else nn.Parameter(torch.zeros(self.num_units, device=device, dtype=dtype))
        self.low_rank = None
        if rank:
            self.low_rank = LowRank(in_features, out_features, rank, generator=generator, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def stored(self) -> nn.Parameter:
        return self.values

    @property
    def layout(self) -> Tensor:
        return self.offsets

    def units(self) -> Tensor:
        return self.offsets.detach().cpu().long()

    @torch.no_grad()
    def replace(self, dropped: Tensor, grown: Tensor) -> Tensor:
        units = self.units()
        freed = torch.nonzero(torch.isin(units, dropped)).flatten()
        units[freed] = -1
        # Freed slots first: as long as the number of units stays, no other row is touched.
        others = torch.nonzero(units < 0).flatten()
        free = torch.cat([freed, others[~torch.isin(others, freed)]])[: grown.numel()]
        units[free] = grown
        self.offsets.copy_(units)
        self._refresh_occupied()
        return torch.cat([freed, free]).unique()

    @torch.no_grad()
    def finalize(self) -> None:
        """End training: free slots are given back, gates become part of the values, alpha is gone; the product stays what it was."""
        values, offsets = self._present()
        self.values, self.offsets = nn.Parameter(values.clone()), offsets.clone()
        self.alpha, self.gate, self._occupied = None, None, None

    def resize_slots(self, slots: int) -> None:
        """Have so many slots, with nothing of use in them yet: for the state of a settled layer, which is loaded next."""
        self.values = nn.Parameter(self.values.new_zeros(slots * self.band, self.length))
        self.offsets = self.offsets.new_zeros(slots)

    def slot_of(self, element: Tensor) -> Tensor:
        return element // self.unit_entries

    def elements(self, slots: Tensor) -> Tensor:
        return (slots[:, None] * self.unit_entries + torch.arange(self.unit_entries, device="cpu")).flatten()

    def unit_scores(self, x: Tensor, dy: Tensor, reduce: Reduce | None) -> Tensor:
        return dst_ops.diagonal_scores(
            x, dy, out_features=self.out_features, in_features=self.in_features, band=self.band, reduce=reduce
        )

    def arrange(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(-1, self.order)

    def position_of(self, element: Tensor) -> Tensor:
        """The position (column of W) of flat elements of `values`; int64 -> int64. Of free slots, any."""
        column = element % self.length
        if self.out_features < self.in_features:
            first = self.offsets.to(element.device, torch.int64) * self.band
            row = element // self.length
            column = (column + first[row // self.band] + row % self.band) % self.in_features
        return column

    def position_gains(self, gradient: Tensor, first_column: int, positions: Tensor) -> Tensor:
        """What the growth signal says of another order of some inputs, float32 [n, n].

        Entry (p, q) is the sum of |dL/dW| over the entries of W that position p has, if p had the input of position q.
        gradient: columns of dL/dW, [out_features, columns] from first_column on; positions: int64 [n]. Of a position q that
        is not among the columns, zeros.
        """
        gains = gradient.new_zeros(positions.numel(), positions.numel())
        here = torch.nonzero((positions >= first_column) & (positions < first_column + gradient.shape[1])).flatten()
        if here.numel() > 0:
            candidates = gradient.new_zeros(self.num_units, self.band)
            candidates[self.offsets[self.offsets >= 0].long()] = 1.0
            tall = self.out_features >= self.in_features
            # Of each offset, whether it is present in rows 0, 1, ... of a column: a run of the candidates, around the end.
            around = (candidates if tall else candidates.flip(0, 1)).flatten().repeat(2)
            first = -positions if tall else ~positions
            present = around.unfold(0, self.out_features, 1)[first % candidates.numel()]
            gains[:, here] = present @ gradient[:, positions[here] - first_column].abs()
        return gains

    def reset_parameters(self) -> None:
        """nn.Linear's uniform initialisation, with the mean number of inputs of an output that stay in place of in_features."""
        bound = 1.0 / math.sqrt(self.in_features * self._initial_density())
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1.0 / math.sqrt(self.in_features), 1.0 / math.sqrt(self.in_features))

    @torch.no_grad()
    def load_dense_init(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over a dense layer's *initialisation*: its entries on the active diagonals, scaled by 1/sqrt(density).

        The scale makes up for the smaller fan-in, so that the variance of the output equals the dense layer's once all but
        the units that stay are gone; scaled by what is there at first, these would stay too small (docs/dynadiag.md). The soft
        gate, small at first, starts from the dense layer's own variance, as the paper's released code does (there with the
        shorter side as the fan-in).
        weight: [out_features, in_features]; bias: [out_features] or None.
        """
        values = dst_ops.from_dense(self.arrange(weight), self.offsets, band=self.band)
        self.values.copy_(values / math.sqrt(self._initial_density()))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def _initial_density(self) -> float:
        return self.num_start / self.num_units if self.gate == "soft" else self.final_density

    def product(self, x: Tensor) -> Tensor:
        values, offsets = self._present()
        y = dst_ops.diagonal_linear(
            self.arrange(x),
            values,
            offsets,
            self.bias,
            out_features=self.out_features,
            in_features=self.in_features,
            band=self.band,
        )
        return y + self.low_rank(x) if self.low_rank is not None and self.low_rank.active else y

    def to_dense(self) -> Tensor:
        values, offsets = self._present()
        dense = dst_ops.to_dense(
            values, offsets, out_features=self.out_features, in_features=self.in_features, band=self.band
        )
        if self.order is not None:
            dense = dense.index_select(1, self.order.argsort())
        return dense if self.low_rank is None else dense + self.low_rank.to_dense()

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, units={self.num_active}/{self.num_units}, band={self.band}, "
            f"bias={self.bias is not None}, gate={self.gate}, permute={self.order is not None}"
        )

    def _present(self) -> tuple[Tensor, Tensor]:
        """Values [K, L] and offsets of the active units, through the gate."""
        values: Tensor = self.values
        offsets = self.offsets
        if self._occupied is not None:
            values = values.view(-1, self.unit_entries)[self._occupied].view(-1, self.length)
            offsets = offsets[self._occupied]
        if self.gate is None or self.alpha is None:
            return values, offsets
        gates = self.gates(self.alpha, offsets.long())
        if self.gate == "straight_through":
            gates = gates - gates.detach() + 1.0  # in this order exactly 1
        gated = values.view(offsets.numel(), -1) * gates.to(values.dtype)[:, None]
        return gated.view_as(values), offsets

    def _refresh_occupied(self) -> None:
        """The slots that hold a unit, where not all do: found once an update, as it makes the host wait for the device."""
        occupied = torch.nonzero(self.offsets >= 0).flatten()
        self._occupied = None if occupied.numel() == self.offsets.numel() else occupied


def _refresh_occupied(layer: DiagonalLinear, _: object) -> None:
    layer._refresh_occupied()  # a function of the module, or the layer could not be pickled
