"""How a topology is trained: the settings of `Topology`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dst_train.topology.methods import METHODS

GROW_SIGNALS = ("exact", "local")


@dataclass(frozen=True)
class Settings:
    """
    method: `static` (no updates); `set` (Mocanu et al. 2018): drops the smallest mean |value|, grows at random; `rigl` (Evci et
        al. 2020): grows the largest gradient; `mest` (Yuan et al. 2021, arXiv 2110.14032): drops the smallest |value| +
        gradient_weight * |gradient|, grows at random (its released code has a gradient_weight of 0 by default, which is
        `set`); `cht`, `chts` (arXiv 2501.19107), `srigl` (arXiv 2305.02299), `chase` (arXiv 2305.19454): see their modules;
        `dynadiag` (arXiv 2506.11449, changed as docs/architecture.md says): by learned importance, needs
        `sparsify(..., gate="straight_through")`, or `gate="soft", explore=inf` for the paper's released code.
    total_steps: optimiser steps of the whole training; updates happen every `every` steps before `until * total_steps`.
    drop_fraction: share of the active units replaced at first, decayed by cosine. None: 0.1 for `dynadiag` (docs/dynadiag.md), 0.3
        for the others.
    grow_signal: see `GrowthSignal`; `mest` and `dynadiag` take |gradient| from it.
    cold_start: second moment of regrown units, as a multiple of the mean of the layer's surviving ones, at least 0. 0: as Adam's
        step counter is shared, their first steps are up to three times as long (SMET, arXiv 2606.00888); what is new catches
        up. 1: steps as long as the others'. More: a warm-up, as the first steps are divided by its root.
    gradient_weight: of `mest`, at least 0.
    gamma_sal: of `srigl`, in [0, 1]; 0 switches ablation off.
    channel_sparsity: of `chase`, the share of outputs without any weight after the last update, in [0, 1).
    temperature: (start, end) of the soft gate, by cosine until `until * total_steps`.
    seed: random growth is a pure function of (seed, layer, update number).
    accumulation: micro-batches (backward passes) per optimiser step.

    Raises:
        ValueError: a setting out of range.
    """

    total_steps: int
    method: str = "rigl"
    every: int = 100
    until: float = 0.75
    drop_fraction: float | None = None
    grow_signal: str = "exact"
    cold_start: float = 0.0
    gradient_weight: float = 1.0
    gamma_sal: float = 0.3
    channel_sparsity: float = 0.5
    temperature: tuple[float, float] = (5.0, 0.05)
    seed: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", ("static", *METHODS)),
            ("grow_signal", GROW_SIGNALS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name in ("total_steps", "every", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, value in (("until", self.until), ("drop_fraction", self.first_drop_fraction)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name}={value}: must be in (0, 1]")
        for name in ("cold_start", "gradient_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and at least 0")
        if not 0.0 <= self.gamma_sal <= 1.0:
            raise ValueError(f"gamma_sal={self.gamma_sal}: must be in [0, 1]")
        if not 0.0 <= self.channel_sparsity < 1.0:
            raise ValueError(f"channel_sparsity={self.channel_sparsity}: must be in [0, 1)")
        if not min(self.temperature) > 0.0:
            raise ValueError(f"temperature={self.temperature}: both must be above 0")

    @property
    def first_drop_fraction(self) -> float:
        """`drop_fraction`, or its default."""
        if self.drop_fraction is None:
            return 0.1 if self.method == "dynadiag" else 0.3
        return self.drop_fraction

    @property
    def last_step(self) -> int:
        """Updates come before it."""
        return int(round(self.until * self.total_steps, 6))  # 0.29 * 100 is less than 29
