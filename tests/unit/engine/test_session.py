"""What a rank does before there is a model."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from dst_train.engine import session


def test_a_rank_selects_its_gpu_before_any_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sends objects by way of the current GPU, and NCCL refuses any but the one that the rank joined with."""
    done: list[str] = []
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(
        device_name=lambda: "cuda", device_count=lambda: 2, set_device=lambda index: done.append(f"set_device({index})")
    )
    monkeypatch.setattr(session, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(session.deepspeed, "init_distributed", lambda **_: done.append("init_distributed"))
    monkeypatch.setattr(session.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(session.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(session.dist, "get_world_size", lambda: 8)
    assert session.init_distributed() == (5, 8)
    assert done == ["set_device(1)", "init_distributed"]


def test_a_rank_with_a_gpu_of_its_own_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    with pytest.raises(
        RuntimeError, match=r"LOCAL_RANK is 3 and this process sees 2 GPUs \(CUDA_VISIBLE_DEVICES is 5,6\)"
    ):
        session._select_gpu(2)
    assert session._select_gpu(8) == 3
    assert session._select_gpu(1) == 0
    assert os.environ["LOCAL_RANK"] == "0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(
        RuntimeError, match=r"LOCAL_RANK is 1 and this process sees 1 GPUs \(CUDA_VISIBLE_DEVICES is not set"
    ):
        session._select_gpu(1)


def test_patience_ends_where_clocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(session.c10d, "_world", SimpleNamespace(pg_map={"all": None}))
    monkeypatch.setattr(
        session.c10d, "set_timeout", lambda limit, group: asked.append(limit.total_seconds()), raising=False
    )
    for minutes in (30.0, 1e15):
        session.extend_collective_timeouts(minutes)
    assert asked == [7200.0, 365 * 24 * 3600.0]
