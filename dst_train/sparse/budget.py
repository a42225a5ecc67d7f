"""Budgets: how the parameters that the rules leave are shared out over the sparse layers."""

from __future__ import annotations

from collections.abc import Sequence

BUDGETS = ("uniform", "erk", "compute_fraction")


def densities(budget: str, shapes: Sequence[tuple[int, int]], target: Sequence[float]) -> list[float]:
    """The density of each layer, such that all layers together keep as many weights as `target` asks for.

    Args:
        budget: `uniform` keeps `target`; `erk` makes density proportional to (M + N) / (M N) (Erdos-Renyi-kernel,
            Evci et al. 2020, arXiv 1911.11134); `compute_fraction` makes it proportional to the layer's share of the
            multiplications, M N, which is our reading of DynaDiag (arXiv 2506.11449, appendix F.3, "budgets proportional
            to layer size"; after Pixelated Butterfly, arXiv 2112.00029, section 3.3). Read literally, of weights and not of
            density, that would be `uniform`.
        shapes: (out_features, in_features) of each layer.
        target: the density each layer's rule asks for, in (0, 1].

    A layer whose share would exceed density 1 becomes dense and the rest is shared out again.

    Raises:
        ValueError: an unknown budget.
    """
    if budget == "uniform":
        return list(target)
    if budget == "erk":
        weight = [(m + n) / (m * n) for m, n in shapes]
    elif budget == "compute_fraction":
        weight = [float(m * n) for m, n in shapes]
    else:
        raise ValueError(f"budget {budget!r} is unknown; choose one of {', '.join(BUDGETS)}")
    sizes = [m * n for m, n in shapes]
    budget_left = sum(d * s for d, s in zip(target, sizes, strict=True))
    result = [0.0] * len(shapes)
    open_layers = list(range(len(shapes)))
    while open_layers:
        scale = budget_left / sum(weight[i] * sizes[i] for i in open_layers)
        full = [i for i in open_layers if scale * weight[i] >= 1.0]
        if not full:
            for i in open_layers:
                result[i] = scale * weight[i]
            break
        for i in full:
            result[i] = 1.0
            budget_left -= sizes[i]
        open_layers = [i for i in open_layers if i not in full]
    return result
