"""The ways to compute a layer that op_cuda.py measures, each with as many sets of tensors as the cache does not hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from contestants import Case
from torch import Tensor

import dst_ops
from dst_ops import cuda
from dst_ops.routes import Call

FORWARD, BOTH = "forward", "forward+backward"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
TOLERANCES = {
    torch.bfloat16: 2e-2,
    torch.float32: 1e-4,
}  # of the largest number; bf16: 8 bits, and sums of other orders

warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support is in beta")
warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")


class Set(NamedTuple):
    """The tensors of one layer."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor


class Contestant:
    """A way to compute `x W^T + bias`.

    Several sets of its tensors take turns, so that each call reads from memory, as it does in a model, whose other layers
    pass through the second-level cache in between. dense() of a weight, or of its gradient, is what it stands for.
    """

    name = ""
    captured = True  # in a CUDA graph
    trained = True  # has a backward pass

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, cache: int) -> None:
        """cache: bytes of the second-level cache."""
        self.case, self.dtype, self.device = case, dtype, device
        longer = torch.randperm(max(case.m, case.n) // case.band, device=device)
        self.offsets = longer[: case.units].int().contiguous()
        self.sizes = (case.m, case.n, case.band)
        first = self._set()
        self.weight_bytes = self.stored(first.weight)
        used = self.weight_bytes + (first.x.numel() + first.dy.numel()) * dtype.itemsize
        self.sets = [first, *(self._set() for _ in range(math.ceil(2 * cache / used) - 1))]

    @property
    def entries(self) -> int:
        """Useful weights: 2 * tokens * entries operations are a product."""
        return self.case.entries

    @property
    def tolerance(self) -> float:
        """The largest error that is no mistake."""
        return TOLERANCES[self.dtype]

    def _set(self) -> Set:
        m, tokens = self.case.m, self.case.tokens
        x, bias, dy = self.normal(tokens, self.case.n), self.normal(m), self.normal(tokens, m)
        weight = self.weight()
        if self.trained:
            x, weight, bias = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
        return Set(x, weight, bias, dy)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def values(self) -> Tensor:
        return self.normal(self.case.diagonals, min(self.case.m, self.case.n))

    def to_dense(self, values: Tensor) -> Tensor:
        m, n, band = self.sizes
        return dst_ops.to_dense(values, self.offsets, out_features=m, in_features=n, band=band)

    def weight(self) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError

    def dense(self, weight: Tensor) -> Tensor:
        return weight.to_dense()

    def stored(self, weight: Tensor) -> int:
        """Bytes."""
        return weight.numel() * weight.element_size()

    def activation(self, y: Tensor) -> Tensor:
        """Of the reference."""
        return y

    def forward(self, s: Set) -> Tensor:
        return self.product(s.x, s.weight, s.bias)

    def both(self, s: Set) -> tuple[Tensor, ...]:
        """The gradients of x, weight and bias."""
        return torch.autograd.grad(self.forward(s), (s.x, s.weight, s.bias), s.dy)

    def calls(self, work: str) -> list[Callable[[], object]]:
        return [partial(self.both if work == BOTH else self.forward, s) for s in self.sets]

    def kernels(self, work: str) -> str:
        """Which kernels of ours serve it."""
        return ""

    def error(self, work: str) -> float:
        """The largest difference from the dense product in fp32 with its own weight, in units of the largest number."""
        s = self.sets[0]
        x, bias = (t.detach().float().requires_grad_() for t in (s.x, s.bias))
        weight = self.dense(s.weight.detach()).float().requires_grad_()
        y = self.activation(F.linear(x, weight, bias))
        with torch.no_grad():
            pairs = [(self.forward(s), y)]
        if work == BOTH:
            dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), s.dy.float())
            ours, present = self.both(s), weight != 0
            pairs += [(ours[0], dx), (self.dense(ours[1]) * present, dweight * present), (ours[2], dbias)]
        return max(float((a.detach().float() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs)


class Ours(Contestant):
    name = "ours"

    def weight(self) -> Tensor:
        return self.values()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Tensor:
        m, n, band = self.sizes
        sizes = {"out_features": m, "in_features": n, "band": band}
        return dst_ops.diagonal_linear(x, weight, self.offsets, bias, activation=activation, **sizes)

    def dense(self, weight: Tensor) -> Tensor:
        return self.to_dense(weight)

    def kernels(self, work: str) -> str:
        """Of the product; for a training step also of the gradients of x and of the values."""
        c = self.case
        calls = [("product", c.n, c.m), ("product", c.m, c.n), ("gradient", c.n, c.m)]
        dtype = str(self.dtype).removeprefix("torch.")
        chosen = [
            cuda.choice(Call(op, c.tokens, inputs, outputs, c.diagonals, c.band, dtype), self.device).kernel
            for op, inputs, outputs in calls[: 3 if work == BOTH else 1]
        ]
        return "/".join(chosen)


class OursThenGelu(Ours):
    name = "ours, then GELU"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Tensor:
        return F.gelu(super().product(x, weight, bias))

    def activation(self, y: Tensor) -> Tensor:
        return F.gelu(y)


class OursWithGelu(OursThenGelu):
    name = "ours with GELU"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Tensor:
        return Ours.product(self, x, weight, bias, "gelu")


class Dense(Contestant):
    """A weight of random numbers, none of them zero: multiplying by zeros takes less power, and clocks follow it."""

    name = "dense"

    @property
    def entries(self) -> int:
        return self.case.m * self.case.n

    def weight(self) -> Tensor:
        return self.normal(self.case.m, self.case.n)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)


class Csr(Contestant):
    """cuSPARSE through torch, with the gradients that torch derives."""

    name = "CSR"
    captured = False

    def weight(self) -> Tensor:
        return self.compressed(self.to_dense(self.values()))

    def compressed(self, dense: Tensor) -> Tensor:
        csr = dense.to_sparse_csr()
        indices = (csr.crow_indices().int(), csr.col_indices().int())  # half of what torch stores: less to read
        return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=False)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias[:, None], weight, x.t()).t()

    def stored(self, weight: Tensor) -> int:
        parts = (weight.crow_indices(), weight.col_indices(), weight.values())
        return sum(t.numel() * t.element_size() for t in parts)


class CsrByHand(Csr):
    """The same product, with gradients as products of cuSPARSE: by a transposed copy, and sampled at the weights."""

    name = "CSR, backward by hand"
    trained = False

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, cache: int) -> None:
        super().__init__(case, dtype, device, cache)
        # A step would bring them up to date, which is not counted.
        self.transposed = {id(s): self.compressed(s.weight.to_dense().t().contiguous()) for s in self.sets}

    @torch.no_grad()
    def both(self, s: Set) -> tuple[Tensor, ...]:
        self.forward(s)
        dx = (self.transposed[id(s)] @ s.dy.t()).t()
        return dx, torch.sparse.sampled_addmm(s.weight, s.dy.t(), s.x, beta=0.0), s.dy.sum(0)


class Bsr(Csr):
    """Blocks of 16 x 16. They fit bands of 16 or more; single diagonals touch nearly every block."""

    name = "BSR 16x16"
    trained = False

    @property
    def tolerance(self) -> float:
        return max(2e-3, super().tolerance)  # torch's own kernel for blocks takes fp32 as TF32

    def compressed(self, dense: Tensor) -> Tensor:
        return dense.to_sparse_bsr((16, 16))


class TwoFour(Contestant):
    """Two of four neighbours, any other pattern than ours: what the sparse tensor cores take."""

    name = "2:4 (50 % dense)"
    captured = False
    trained = False

    @property
    def entries(self) -> int:
        return self.case.m * self.case.n // 2

    def weight(self) -> Tensor:
        groups = self.normal(self.case.m, self.case.n // 4, 4)
        kept = torch.rand(groups.shape, device=self.device).topk(2).indices
        weight = torch.zeros_like(groups).scatter(2, kept, groups).flatten(1)
        if not hasattr(self, "original"):
            self.original = weight  # of the first set
        return torch.sparse.to_sparse_semi_structured(weight)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def dense(self, weight: Tensor) -> Tensor:
        return self.original

    def stored(self, weight: Tensor) -> int:
        return self.original.numel() * (self.dtype.itemsize * 8 + 2) // 16  # half of the numbers, 2 bits each for where
