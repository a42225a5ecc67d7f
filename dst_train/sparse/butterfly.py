"""ButterflyLinear: Pixelated Butterfly, a fixed block-sparse weight plus a low-rank one (Dao et al. 2021, arXiv 2112.00029)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst_train.sparse.layer import check_sparsity

# The paper gives a quarter to a third of a layer's weights to the low-rank part.
LOW_RANK_SHARE = 0.25


class ButterflyLinear(nn.Module):
    """`y = x (g B + (1 - g) U V)^T + b`: B is flat block butterfly, U V has a low rank, g is learned (the paper's section 3).

    B is cut into n x n blocks, n = min(out_features, in_features) / size; of a wide or tall layer they are longer than `size`
    on the longer side. Block (i, j) is there if i = j or if i and j differ in one of the lowest `factors` bits, which is the sum of
    the identity and the butterfly factors of strides 1, 2, 4, ... . B has as many factors as fit into 1 - LOW_RANK_SHARE of the
    weights that `sparsity` leaves; the rank is what fits into the rest, at least 1. B is a dense weight and a mask: a baseline for accuracy,
    not for speed. Nothing in it is dynamic, so it is no `SparseLayer`. The authors' code makes g a function of x; this is the
    scalar of the paper, through a sigmoid.

    Attributes:
        weight: Parameter [out_features, in_features]; zero where the mask is.
        mask: bool buffer [out_features, in_features].
        up, down: Parameters [out_features, rank] and [rank, in_features], U and V.
        mix: Parameter [1]; g = sigmoid(mix), 1/2 at first.
        bias: Parameter [out_features] or None.
        num_units, num_final: entries of the dense weight; entries in the mask, up and down.

    Args:
        sparsity: share of weights that are not there, low-rank ones counted.
        generator: CPU generator that draws U and V; the global one when None.

    Raises:
        ValueError: sparsity outside [0, 1), a size that does not cut the layer into a power of two of blocks, or a sparsity that
            leaves less than the identity and one factor.
    """

    pattern = "butterfly"
    replaced: type[nn.Module] = nn.Linear  # see SparseLayer
    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float,
        size: int,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sparsity(sparsity)
        shorter, longer = sorted((in_features, out_features))
        blocks = shorter // size if size >= 1 and shorter % size == 0 else 0
        if blocks < 2 or blocks & (blocks - 1) or longer % blocks:
            raise ValueError(
                f"size={size}: must cut {out_features} x {in_features} into n x n blocks with n = {shorter} / size a power of 2"
            )
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.num_units = in_features * out_features
        # The tolerance is for a density that comes as 1 - (1 - d).
        affordable = int((1.0 - LOW_RANK_SHARE) * (1.0 - sparsity) * blocks + 1e-6) - 1
        if affordable < 1:
            raise ValueError(
                f"sparsity={sparsity}: blocks of size {size} need a density of {2 / blocks / (1 - LOW_RANK_SHARE):.4g}; "
                "use a smaller size or sparsity"
            )
        self.factors = min(affordable, blocks.bit_length() - 1)
        layout = flat_butterfly(blocks, self.factors)
        mask = layout.repeat_interleave(out_features // blocks, 0).repeat_interleave(in_features // blocks, 1)
        left = (1.0 - sparsity) * self.num_units - int(mask.sum())
        self.rank = min(shorter, max(1, int(left / (in_features + out_features))))
        self.num_final = int(mask.sum()) + self.rank * (in_features + out_features)
        device = torch.get_default_device() if device is None else device
        self.register_buffer("mask", mask.to(device))
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        up, down = torch.empty(out_features, self.rank, device="cpu"), torch.empty(self.rank, in_features, device="cpu")
        self.up = nn.Parameter(up.normal_(generator=generator).to(device, dtype))
        self.down = nn.Parameter(down.normal_(generator=generator).to(device, dtype))
        self.mix = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        bound = 1.0 / math.sqrt(in_features)
        weight = torch.empty_like(self.weight).uniform_(-bound, bound)
        self.load_dense_init(weight, None if self.bias is None else torch.empty_like(self.bias).uniform_(-bound, bound))

    @torch.no_grad()
    def load_dense_init(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over a dense layer's initialisation in B; both parts are scaled so that y varies as the dense layer's does."""
        # g^2 + (1 - g)^2 = 1/2 of the variance that each part has.
        self.weight.copy_(weight * self.mask * math.sqrt(2 * self.blocks / (self.factors + 1)))
        product = float((self.up.double() @ self.down.double()).square().mean())
        scale = (2 * float(weight.double().square().mean()) / product) ** 0.25
        self.up.mul_(scale)
        self.down.mul_(
            scale or 1.0 / math.sqrt(self.in_features)
        )  # of a weight of zeros one factor must not be zero, or none learns
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        mix = torch.sigmoid(self.mix)
        low_rank = F.linear(F.linear(x, self.down), self.up)
        return F.linear(x, mix * self.weight * self.mask, self.bias) + (1.0 - mix) * low_rank

    def to_dense(self) -> Tensor:
        mix = torch.sigmoid(self.mix)
        return mix * self.weight * self.mask + (1.0 - mix) * self.up @ self.down

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, blocks={self.blocks} x {self.blocks}, factors={self.factors}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def flat_butterfly(blocks: int, factors: int) -> Tensor:
    """bool [blocks, blocks]: the identity and the butterfly factors of strides 1, 2, ..., 2^(factors - 1)."""
    place = torch.arange(blocks, device="cpu")
    layout = torch.eye(blocks, dtype=torch.bool, device="cpu")
    for bit in range(factors):
        layout[place, place ^ (1 << bit)] = True
    return layout
