"""A complete job as text, and a way to load changed copies of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dst_train.job import Job, load

TEXT = """\
name: base
model: {builder: mlp, in_features: 784, hidden_features: [64, 64], num_classes: 10}
sparsity:
  rules:
    - {match: "layers.*", sparsity: 0.9}
topology: {method: rigl}
data:
  train: {shards: "a-{000..003}.tar", samples: 1000, transform: digits}
train:
  epochs: 2
  batch_size: 100
  micro_batch_size: 25
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str = TEXT, name: str = "job.yaml", **replacements: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def base(write: Callable[..., Path]) -> Job:
    return load(write())
