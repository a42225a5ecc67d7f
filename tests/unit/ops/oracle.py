"""The weight written out with loops, and cases to try: independent of dst_ops."""

from __future__ import annotations

import torch
from torch import Tensor

# (out_features, in_features, active units, band): M > N, M = N, M < N; K = 1, K = P; not multiples of any vector width.
CASES = [
    (7, 5, 3, 1),
    (5, 7, 7, 1),
    (6, 6, 2, 1),
    (1, 9, 4, 1),
    (9, 1, 9, 1),
    (64, 64, 64, 1),
    (33, 97, 11, 1),
    (97, 33, 1, 1),
    (40, 41, 6, 1),
    (48, 32, 2, 8),
    (32, 96, 2, 16),
    (128, 128, 3, 32),
]


def dense(values: Tensor, units: list[int], out_features: int, in_features: int, band: int) -> Tensor:
    device, values = values.device, values.cpu()
    weight = torch.zeros(out_features, in_features, dtype=torch.float64, device="cpu")
    for slot, unit in enumerate(units):
        for i in range(band):
            for j in range(min(out_features, in_features)):
                offset = unit * band + i
                at = (
                    ((j + offset) % out_features, j) if out_features >= in_features else (j, (j + offset) % in_features)
                )
                weight[at] += values[slot * band + i, j].double()
    return weight.to(device)


def case(
    m: int, n: int, active: int, band: int, dtype: torch.dtype, batch: tuple[int, ...] = (5,), seed: int = 0
) -> dict:
    """x, values, offsets (in random order), bias, dy and the sizes; the same numbers on every device."""
    g, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    units = torch.randperm(max(m, n) // band, generator=g, device="cpu")[:active].to(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu").to(device, dtype)

    return {
        "x": draw(*batch, n), "values": draw(active * band, min(m, n)), "offsets": units.int(), "bias": draw(m),
        "dy": draw(*batch, m), "sizes": {"out_features": m, "in_features": n, "band": band},
    }  # fmt: skip
