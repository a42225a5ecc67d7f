"""The layers that op_cpu.py measures, and the ways to compute them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dst_ops
from dst_ops import reference

warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support is in beta")


@dataclass(frozen=True)
class Case:
    """A diagonally sparse layer and the number of tokens that it is given."""

    tokens: int
    n: int  # in_features
    m: int  # out_features
    sparsity: float
    band: int

    @property
    def units(self) -> int:
        return max(1, round((1 - self.sparsity) * max(self.m, self.n) / self.band))

    @property
    def diagonals(self) -> int:
        return self.units * self.band

    @property
    def entries(self) -> int:
        """Weights that are present."""
        return self.diagonals * min(self.m, self.n)


@dataclass(frozen=True)
class Contestant:
    """One way to compute a layer."""

    name: str
    forward: Callable[[], Tensor]
    both: Callable[[], object] | None  # forward and backward; None: it has no backward
    entries: int  # useful operations of a product: 2 * tokens * entries
    dtype: torch.dtype = torch.float32
    slow: bool = False


class Layer:
    """The tensors of a case, and its contestants."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, run: int | None = None) -> None:
        """run: how many tokens lie side by side; None: the features of each do."""
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

        def tokens(features: int) -> Tensor:
            if run is None:
                return normal(case.tokens, features).detach()
            return normal(case.tokens // run, features, run).detach().mT

        self.case, self.dtype = case, dtype
        self.x, self.dy = tokens(case.n).requires_grad_(), tokens(case.m)
        self.values, self.bias = normal(case.diagonals, min(case.m, case.n)), normal(case.m)
        self.offsets = torch.randperm(max(case.m, case.n) // case.band, generator=random)[: case.units].int()
        self.sizes: dict[str, Any] = {"out_features": case.m, "in_features": case.n, "band": case.band}

    def weight(self) -> Tensor:
        return dst_ops.to_dense(self.values.detach(), self.offsets, **self.sizes)

    def contestant(
        self, name: str, forward: Callable[[], Tensor], weight: Tensor | None, *, slow: bool = False
    ) -> Contestant:
        """weight: what its backward computes the gradient of, or None if it has no backward."""

        def both() -> object:
            return torch.autograd.grad(forward(), (self.x, weight, self.bias), self.dy)  # type: ignore[arg-type]

        entries = self.case.m * self.case.n if name == "dense" else self.case.entries
        return Contestant(name, forward, None if weight is None else both, entries, self.dtype, slow)

    def ours(self) -> Contestant:
        def forward() -> Tensor:
            return dst_ops.diagonal_linear(self.x, self.values, self.offsets, self.bias, **self.sizes)

        return self.contestant("ours", forward, self.values)

    def dense(self) -> Contestant:
        weight = self.weight().requires_grad_()
        bf16 = torch.bfloat16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else None
        backward = weight if self.dtype in (torch.float32, bf16) else None  # takes seconds
        return self.contestant("dense", lambda: F.linear(self.x, weight, self.bias), backward)

    def torch_sparse(self, name: str) -> Contestant:
        """CSR, or BSR in blocks of 16 x 16; this is the quickest of torch's ways to write the product."""
        dense = self.weight()
        weight = (dense.to_sparse_csr() if name == "CSR" else dense.to_sparse_bsr((16, 16))).requires_grad_()

        def forward() -> Tensor:
            return torch.addmm(self.bias[:, None], weight, self.x.t()).t()

        return self.contestant(name, forward, weight if name == "CSR" else None)

    def rolls(self) -> Contestant:
        """Plain PyTorch, one diagonal after the other."""
        m, n = self.case.m, self.case.n
        candidates = reference.candidates(self.offsets, self.case.band).tolist()

        def forward() -> Tensor:
            y = self.bias.expand(self.case.tokens, m)
            for offset, values in zip(candidates, self.values, strict=True):
                if m >= n:
                    y = y + torch.roll(F.pad(values * self.x, (0, m - n)), offset, 1)
                else:
                    y = y + values * torch.roll(self.x, -offset, 1)[:, :m]
            return y

        return self.contestant("rolls", forward, self.values, slow=True)

    def gather_scatter(self) -> Contestant:
        """Plain PyTorch, 64 diagonals at once: the inputs are gathered, multiplied and scattered to the outputs."""
        positions = reference.positions(self.offsets, self.case.m, self.case.n, self.case.band)
        rows, columns = (p.split(64) for p in positions)

        def forward() -> Tensor:
            y = self.x.new_zeros(self.case.m, self.case.tokens)  # transposed: whole rows are gathered and scattered
            for row, column, values in zip(rows, columns, self.values.split(64), strict=True):
                y = y.index_add(0, row.flatten(), self.x.t()[column.flatten()] * values.reshape(-1, 1))
            return y.t() + self.bias

        return self.contestant("gather/scatter", forward, self.values, slow=True)


def transposed(case: Case) -> list[Contestant]:
    layer = Layer(case, run=512)
    return [layer.ours(), layer.dense()]


def against_dense(case: Case) -> list[Contestant]:
    layer = Layer(case)
    return [layer.ours(), layer.dense()]


def alternatives(case: Case) -> list[Contestant]:
    layer = Layer(case)
    dense = layer.dense()
    sparse = [layer.torch_sparse("CSR"), layer.torch_sparse("BSR"), layer.rolls(), layer.gather_scatter()]
    all_of_them = [layer.ours(), dense, *sparse]
    for contestant in all_of_them:  # a comparison is worth something if all compute the same
        torch.testing.assert_close(contestant.forward(), dense.forward(), rtol=1e-4, atol=1e-3)
    return all_of_them


def dtypes(case: Case) -> list[Contestant]:
    layers = [Layer(case, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return [contestant for layer in layers for contestant in (layer.ours(), layer.dense())]


def scores(case: Case) -> list[Contestant]:
    """The growth signal of all candidates, against the product inside it: the gradient of a dense weight."""
    layer = Layer(case)
    x, dy, entries = layer.x.detach(), layer.dy, case.m * case.n

    def ours() -> Tensor:
        return dst_ops.diagonal_scores(x, dy, out_features=case.m, in_features=case.n, band=case.band)

    return [Contestant("ours", ours, None, entries), Contestant("dense", lambda: dy.t() @ x, None, entries)]
