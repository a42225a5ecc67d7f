"""Shards whose images carry their own number, and jobs that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dst_train.data import write_shards
from dst_train.job.schema import Job


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Five shards of ten 28 x 28 images: the first pixel of image i is i, its label i % 7."""
    images = np.zeros((50, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(50)
    return write_shards(tmp_path / "shards", "a", images, np.arange(50) % 7, 10)


@pytest.fixture
def numbers() -> Callable[[torch.Tensor], list[int]]:
    """The numbers of the images in a batch that the digits transform made."""
    return lambda inputs: (inputs[:, 0, 0, 0] * 0.3081 + 0.1307).mul(255).round().int().tolist()


@pytest.fixture
def split(shards: list[Path]) -> dict[str, Any]:
    return {"shards": str(shards[0].parent / "a-{000000..000004}.tar"), "samples": 50, "transform": "digits"}


@pytest.fixture
def make_job(split: dict[str, Any]) -> Callable[..., Job]:
    def make(seed: int = 0, train: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> Job:
        content = {
            "name": "test",
            "seed": seed,
            "model": {"builder": "mlp", "in_features": 784, "hidden_features": [8], "num_classes": 7},
            "data": {"train": split, "eval": split, **(data or {})},
            "train": {"epochs": 2, "batch_size": 16, "micro_batch_size": 4, **(train or {})},
            "optimizer": {"lr": 1e-3},
        }
        return Job.model_validate(content)

    return make
