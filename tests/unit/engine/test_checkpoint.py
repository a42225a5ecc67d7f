"""Checkpoints in one process: a crash at any point of a save leaves the previous checkpoint or the whole new one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dst_train.engine import checkpoint, load_model
from dst_train.engine import manifest as manifests
from dst_train.engine.checkpoint import Checkpoints
from dst_train.engine.manifest import CheckpointError


class CrashError(Exception):
    pass


class FakeEngine:
    """Writes what a DeepSpeed engine writes: some files in a folder; loads by remembering the client state."""

    def __init__(self) -> None:
        self.client: dict[str, Any] = {}

    def save_checkpoint(self, root: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert not save_latest
        folder = Path(root) / tag
        folder.mkdir(parents=True)
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            (folder / name).write_bytes(os.urandom(100))
        self.client = client_state

    def zero_optimization_stage(self) -> int:
        return 0

    def load_checkpoint(self, root: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        return (root if tag != "step-00000007" else None), self.client


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _save(checkpoints: Checkpoints, step: int) -> list[str]:
    engine: Any = FakeEngine()
    return checkpoints.save(engine, step, {"step": step}, {"job": {"name": "x"}, "topology_digest": "0"})


def _crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Raises at the call-th time that a file is synced or renamed; the list grows with the calls."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def crashing(*args: Any, original: Any = original, name: str = name) -> Any:
            calls.append(name)
            if len(calls) == call:
                raise CrashError
            return original(*args)

        monkeypatch.setattr(manifests.os, name, crashing)
    return calls


def test_a_crash_at_any_point_loses_at_most_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, found_tags = 1, []
    while True:
        checkpoints = Checkpoints(tmp_path / str(call), keep=2)
        _save(checkpoints, 1)
        with monkeypatch.context() as patch:
            calls = _crash_at(call, patch)
            with contextlib.suppress(CrashError):
                _save(checkpoints, 2)
        found, notes = checkpoints.newest()
        assert found is not None
        assert found.step in (1, 2)
        assert notes == []
        found_tags.append(found.tag)
        # The next run writes the step again, whatever the crash left behind.
        _save(checkpoints, 2)
        found, _ = checkpoints.newest()
        assert found is not None
        assert found.step == 2
        assert (tmp_path / str(call) / "latest").read_text() in ("step-00000001", "step-00000002")
        if len(calls) < call:
            break
        call += 1
    assert call > 6
    assert set(found_tags) == {"step-00000001", "step-00000002"}


def test_keep_and_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() == (None, [])
    for step in (1, 2, 3):
        assert _save(checkpoints, step) == [f"checkpoint step-0000000{step}"]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert _save(checkpoints, 3) == ["checkpoint step-00000003 is already there"]

    def refuse(path: Path) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or refuse(path))
        assert _save(checkpoints, 4)[1] == "could not remove the checkpoint step-00000002: busy"


def test_a_bad_newest_is_passed_over_and_only_bad_ones_are_an_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        _save(checkpoints, step)
    shard = tmp_path / "step-00000002/mp_rank_00_model_states.pt"
    raw = shard.read_bytes()
    for damage, reason in ((raw[:50], "has 50 bytes instead of 100"), (raw[:99] + bytes([raw[99] ^ 1]), "sha256")):
        shard.write_bytes(damage)
        found, notes = checkpoints.newest()
        assert found is not None
        assert found.step == 1
        assert "checkpoint step-00000002: mp_rank_00_model_states.pt" in notes[0]
        assert reason in notes[0]
    shard.unlink()
    (tmp_path / "step-00000001/manifest.json").write_text("{}")
    message = r"no checkpoint under .*step-00000002: mp_rank_00\S+ is missing; step-00000001: unreadable manifest"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.newest()


def test_what_is_later_than_a_new_checkpoint_is_given_up(tmp_path: Path) -> None:
    """Two damaged ones would else count as the newest, and a good one go for them."""
    for step in (10, 11, 12):
        _save(Checkpoints(tmp_path, keep=3), step)
    for step in (11, 12):
        (tmp_path / f"step-000000{step}/manifest.json").write_text("{")
    checkpoints = Checkpoints(tmp_path, keep=2)
    found, notes = checkpoints.newest()
    assert found is not None
    assert (found.step, len(notes)) == (10, 2)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000008")
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000007")
    shutil.rmtree(tmp_path / "step-00000010")
    others = ["step-00000010.keep", "step-best"]
    for name in others:
        (tmp_path / name).mkdir()
    _save(checkpoints, 10)
    assert (tmp_path / "latest").read_text() == "step-00000010"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000008", "step-00000010", *others]


@pytest.mark.parametrize(("line", "number"), [("", 1), ('"format": 99,', 99)], ids=["none", "later"])
def test_another_format_is_refused(tmp_path: Path, line: str, number: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    _save(checkpoints, 1)
    manifest = tmp_path / "step-00000001/manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {manifests.FORMAT},', line))
    message = (
        f"step-00000001 has format {number} and this version of dst-train reads format {manifests.FORMAT}; continue"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoints.newest()


def test_loading_restores_state_and_random_numbers(tmp_path: Path) -> None:
    import random

    import numpy as np
    import torch

    checkpoints, engine = Checkpoints(tmp_path, keep=2), FakeEngine()
    as_engine: Any = engine
    checkpoints.save(as_engine, 5, {"a": 1}, {"job": {}, "topology_digest": "0"})
    drawn = torch.rand(3), np.random.rand(3), random.random()
    found, _ = checkpoints.newest()
    assert found is not None
    assert checkpoints.load(as_engine, found) == {"a": 1}
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]


def test_loading_errors(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    engine: Any = FakeEngine()
    with pytest.raises(CheckpointError, match=r"DeepSpeed could not load .* on rank 0"):
        checkpoints.load(engine, manifests.Found("step-00000007", 7, 1, {}, "0", manifests.FORMAT))


def test_a_run_without_a_checkpoint_has_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint under .*checkpoints can be used$"):
        load_model(tmp_path)
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="can be used: step-00000001: unreadable manifest"):
        load_model(tmp_path)


def test_a_job_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = manifests.Found("step-00000007", 7, 1, {"nmae": "old"}, "0", manifests.FORMAT)
    monkeypatch.setattr("dst_train.engine.load.search", lambda root: (found, []))
    with pytest.raises(CheckpointError, match=r"(?s)step-00000007 has a job of another version of dst-train: .*nmae"):
        load_model(tmp_path)


def test_what_a_checkpoint_says_of_itself_is_verified_too(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        _save(checkpoints, step)
    manifest = tmp_path / "step-00000002/manifest.json"
    whole = manifest.read_text()
    for text in (
        whole.replace('"step": 2', '"step": 3'),
        whole.replace('"step"', '"stop"'),
        "[]",
        "3",
        f'{{"format": {manifests.FORMAT}}}',
    ):
        assert text != whole
        manifest.write_text(text)
        found, notes = checkpoints.newest()
        assert found is not None
        assert (found.step, len(notes)) == (1, 1)
        assert "step-00000002: unreadable manifest" in notes[0]


def test_one_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        _save(checkpoints, step)

    def read(path: Path) -> str:
        if "step-00000002" in str(path):
            raise PermissionError("not yours")
        return sha256(path)

    sha256 = manifests._sha256
    monkeypatch.setattr(manifests, "_sha256", read)
    found, notes = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    assert notes == ["checkpoint step-00000002: unreadable (not yours); taking the one before"]


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    _save(checkpoints, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    found, notes = checkpoints.newest()
    assert found is not None
    assert (found.step, notes) == (1, [])
    assert not list(tmp_path.glob("*.partial"))
