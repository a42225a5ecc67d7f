"""MaskedLinear: a dense weight and a mask. A baseline for accuracy: it is no faster, and no smaller, than nn.Linear."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst_train.sparse.layer import Reduce, SparseLayer, check_sparsity, count_active

PATTERNS = ("unstructured", "constant_fan_in", "n_m", "block", "shuffled_block", "tile_wise")


class MaskedLinear(SparseLayer):
    """`y = x (W * mask)^T + b`.

    Patterns, their units and groups:
        unstructured: an entry; all of the weight.
        constant_fan_in: an entry; a row, so that every output has as many inputs (SRigL, arXiv 2305.02299).
        n_m: an entry; `size` adjacent entries of a row, N = (1 - sparsity) * size of which stay.
        block: a tile of size x size entries; all of the weight.
        shuffled_block: as block, of a weight whose rows and columns are in a random order that does not change.
        tile_wise: one input of `size` adjacent outputs; all of the weight (arXiv 2008.13006: what that paper prunes of a
            tile after it has removed whole outputs, which this does not).

    Attributes:
        weight: Parameter [out_features, in_features]; zero where the mask is.
        mask: bool buffer [out_features, in_features].
        rows, columns: of `shuffled_block`, int64 buffers with the place of each row and column in that order; else None.

    Args:
        size: of `n_m`, blocks and `tile_wise`; must divide in_features (not of `tile_wise`) and out_features (not of `n_m`).
        explore: active units at first, as a multiple of those that stay; inf for all.
        generator: CPU generator that draws the order and the first mask; the global one when None.

    Raises:
        ValueError: an unknown pattern, sparsity outside [0, 1), explore below 1, or a size that does not divide.
    """

    mask: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pattern: str,
        sparsity: float,
        size: int = 1,
        bias: bool = True,
        explore: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pattern not in PATTERNS:
            raise ValueError(f"pattern={pattern!r}: choose one of {', '.join(PATTERNS)}")
        check_sparsity(sparsity)
        if not explore >= 1.0:
            raise ValueError(f"explore={explore}: must be at least 1")
        for key, features, unless in (
            ("in_features", in_features, "tile_wise"),
            ("out_features", out_features, "n_m"),
        ):
            if size < 1 or (pattern != unless and features % size):
                raise ValueError(f"size={size}: must divide {key}={features}")
        self.in_features, self.out_features, self.pattern = in_features, out_features, pattern
        device = torch.get_default_device() if device is None else device
        self._height = 1 if pattern in ("unstructured", "constant_fan_in", "n_m") else size
        self._width = size if "block" in pattern else 1
        self.num_units = out_features // self._height * (in_features // self._width)
        self.unit_entries = self._height * self._width
        self.num_groups = {"constant_fan_in": out_features, "n_m": out_features * in_features // size}.get(pattern, 1)
        for name, features in (("rows", out_features), ("columns", in_features)):
            shuffled = pattern == "shuffled_block"
            order = torch.randperm(features, generator=generator, device="cpu").to(device) if shuffled else None
            self.register_buffer(name, order)
        in_group = self.num_units // self.num_groups
        final = count_active(1.0 - sparsity, in_group)
        start = round(min(explore * final, float(in_group)))
        self.num_final, self.num_start = final * self.num_groups, start * self.num_groups
        chosen = torch.rand(self.num_groups, in_group, generator=generator, device="cpu").argsort(1)[:, :start]
        active = torch.zeros(self.num_groups, in_group, dtype=torch.bool, device="cpu").scatter_(1, chosen, True)
        self.register_buffer("mask", self._spread(active.to(device=device)))
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.alpha = None
        self.reset_parameters()

    @property
    def stored(self) -> nn.Parameter:
        return self.weight

    @property
    def layout(self) -> Tensor:
        return self.mask

    def units(self) -> Tensor:
        """Slot u holds unit u, or none."""
        active = self._cut(self.mask)[:, 0, :, 0].flatten()
        return torch.arange(self.num_units, device=active.device).masked_fill_(~active, -1)

    @property
    def num_active(self) -> int:
        return int(self.mask.sum()) // self.unit_entries

    @torch.no_grad()
    def replace(self, dropped: Tensor, grown: Tensor) -> Tensor:
        active = self.units() >= 0
        active[dropped], active[grown] = False, True
        self.mask.copy_(self._spread(active))
        return torch.cat([dropped, grown])

    def slot_of(self, element: Tensor) -> Tensor:
        if self.unit_entries == 1 and self.rows is None:
            return element
        row, column = element.div(self.in_features, rounding_mode="floor"), element % self.in_features
        if self.rows is not None and self.columns is not None:
            row, column = self.rows.to(row.device)[row], self.columns.to(row.device)[column]
        row, column = row.div(self._height, rounding_mode="floor"), column.div(self._width, rounding_mode="floor")
        return row * (self.in_features // self._width) + column

    def elements(self, slots: Tensor) -> Tensor:
        if self.unit_entries == 1 and self.rows is None:
            return slots
        wanted = torch.zeros(self.num_units, dtype=torch.bool, device=slots.device)
        wanted[slots] = True
        return torch.nonzero(self._spread(wanted).flatten()).flatten()

    def unit_scores(self, x: Tensor, dy: Tensor, reduce: Reduce | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            gradient = dy.float().t() @ x.float()
        if reduce is not None:
            gradient = reduce(gradient, 0)
        return self._cut(gradient.abs()).mean((1, 3)).flatten()

    def _cut(self, matrix: Tensor) -> Tensor:
        """[out_features, in_features] into its units: [row of units, row within, column of units, column within]."""
        if self.rows is not None and self.columns is not None:
            matrix = matrix[self.rows.argsort()][:, self.columns.argsort()]
        return matrix.reshape(-1, self._height, self.in_features // self._width, self._width)

    def _spread(self, of_unit: Tensor) -> Tensor:
        """[num_units] to [out_features, in_features]: what its unit has, for each entry."""
        across = self.in_features // self._width
        matrix = of_unit.view(-1, 1, across, 1).expand(-1, self._height, across, self._width)
        matrix = matrix.reshape(self.out_features, self.in_features)
        if self.rows is not None and self.columns is not None:
            matrix = matrix[self.rows.to(matrix.device)][:, self.columns.to(matrix.device)]
        return matrix

    def reset_parameters(self) -> None:
        """nn.Linear's uniform initialisation, with the mean number of active inputs of an output in place of in_features."""
        bound = 1.0 / math.sqrt(self.in_features)
        weight = torch.empty_like(self.weight).uniform_(-bound, bound)
        bias = None if self.bias is None else torch.empty_like(self.bias).uniform_(-bound, bound)
        self.load_dense_init(weight, bias)

    @torch.no_grad()
    def load_dense_init(self, weight: Tensor, bias: Tensor | None) -> None:
        """As `DiagonalLinear.load_dense_init`: the entries of the active units, scaled by 1/sqrt(density)."""
        self.weight.copy_(weight * self.mask / math.sqrt(self.final_density))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    def to_dense(self) -> Tensor:
        return self.weight * self.mask

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.pattern}, units={self.num_active}/{self.num_units}"
