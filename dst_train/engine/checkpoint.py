"""Sharded checkpoints that are either whole and verified, or not there.

Every rank writes its shards into a staging directory; after a barrier rank 0 writes a manifest with the size and sha256
of each file, syncs, renames the directory and only then replaces the `latest` pointer. Loading trusts nothing but a
manifest that verifies. All ranks must see the same file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from dst_train.engine import reshard
from dst_train.files import write_text

T = TypeVar("T")
MANIFEST = "manifest.json"
CLIENT_KEY = "dst_train"
FORMAT = 4  # of what is saved beside DeepSpeed's own; another number after every change of it


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says which and what to do."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint on disk; `job` is the canonical form of the job that wrote it."""

    tag: str
    step: int
    world_size: int
    job: dict[str, Any]
    topology_digest: str
    format: int

    @property
    def stage(self) -> int:
        """The ZeRO stage that wrote it."""
        stage: int = self.job["deepspeed"]["zero_optimization"]["stage"]
        return stage


class Checkpoints:
    """The checkpoints of one run directory. All methods are collective.

    Args:
        root: folder of checkpoints.
        keep: newest ones kept, at least 2.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep
        self._rank = dist.get_rank()

    def save(self, engine: DeepSpeedEngine, step: int, state: dict[str, Any], facts: dict[str, Any]) -> list[str]:
        """Write the engine, every rank's random state and `state` as `step-NNNNNNNN`; `facts` go into the manifest,
        `job` and `topology_digest` among them.

        Returns what there is to say of it, on rank 0.
        """
        tag = f"step-{step:08d}"
        if broadcast(self._rank == 0 and _problem(self._root / tag) is None):
            return [f"checkpoint {tag} is already there"]
        staging = f"{tag}.partial"
        if self._rank == 0:
            shutil.rmtree(self._root / staging, ignore_errors=True)
            shutil.rmtree(self._root / tag, ignore_errors=True)
        dist.barrier()
        layouts = _gather(reshard.layout(engine))
        client = {CLIENT_KEY: {"state": state, "random": _gather(_random_state()), "layouts": layouts}}
        engine.save_checkpoint(str(self._root), tag=staging, client_state=client, save_latest=False)
        dist.barrier()
        notes = [f"checkpoint {tag}"]
        if self._rank == 0:
            self._commit(tag, staging, {"format": FORMAT, "step": step, "world_size": dist.get_world_size(), **facts})
            notes += self._prune(tag)
        dist.barrier()
        return notes

    def newest(self) -> tuple[Found | None, list[str]]:
        """The newest checkpoint that verifies (None when there is none at all), and what was passed over.

        Raises:
            CheckpointError: on every rank, when there are checkpoints and none of them verifies, or when it is of another format.
        """
        if self._rank == 0:
            for left in self._root.glob("step-*.partial"):  # by a process that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
        found, bad = broadcast(search(self._root) if self._rank == 0 else None)
        if found is None and bad:
            raise CheckpointError(f"no checkpoint under {self._root} can be used: {'; '.join(bad)}")
        if found is not None and found.format != FORMAT:
            raise CheckpointError(
                f"checkpoint {self._root / found.tag} has format {found.format} and this version of dst-train reads format "
                f"{FORMAT}; continue with the version that wrote it, or give the job another name, under which it starts anew"
            )
        return found, [f"checkpoint {line}; taking the one before" for line in bad]

    def load(self, engine: DeepSpeedEngine, found: Found) -> dict[str, Any]:
        """Restore the engine and its buffers; returns the `state` given to `save`.

        On the number of ranks that wrote it, this rank's random state as well, so that training continues to the bit; on
        another, streams of random numbers have no continuation, and are as they were.

        Raises:
            CheckpointError: on every rank, when DeepSpeed finds nothing to load on some, or the shards do not fit the model.
        """
        world_size, stage = dist.get_world_size(), engine.zero_optimization_stage()
        if stage and (found.world_size, found.stage) != (world_size, stage):
            client = self._reshard(engine, found)
        else:
            path, client = engine.load_checkpoint(str(self._root), tag=found.tag)
            failed = [str(rank) for rank, path in enumerate(_gather(path)) if path is None]
            if failed:
                raise CheckpointError(f"DeepSpeed could not load {self._root / found.tag} on rank {', '.join(failed)}")
        if found.world_size == world_size:
            _restore_random_state(client[CLIENT_KEY]["random"][self._rank])
        return client[CLIENT_KEY]["state"]

    def _reshard(self, engine: DeepSpeedEngine, found: Found) -> dict[str, Any]:
        folder = self._root / found.tag
        saved = reshard.rank_0(folder)
        try:
            reshard.restore(engine, folder, saved, saved[CLIENT_KEY]["layouts"])
        except ValueError as error:
            raise CheckpointError(f"{folder} does not fit the model: {error}") from error
        return saved

    def _commit(self, tag: str, staging: str, facts: dict[str, Any]) -> None:
        folder = self._root / staging
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        listed = dict(zip(files, _in_threads(_seal, files.values()), strict=True))
        manifest = {**facts, "files": listed}
        write_text(folder / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
        _sync(folder)
        os.replace(folder, self._root / tag)
        _sync(self._root)  # before `latest` names it
        write_text(self._root / "latest", tag)
        _sync(self._root)

    def _prune(self, newest: str) -> list[str]:
        """What is older than the newest `keep`, and later than `newest`: damaged, or the run would have continued from there."""
        notes = []
        tags = _tags(self._root)
        past = tags[: tags.index(newest) + 1]
        for name in past[: -self._keep] + tags[len(past) :]:
            try:
                shutil.rmtree(self._root / name)
            except OSError as error:  # a flaky disk must not end the training
                notes.append(f"could not remove the checkpoint {name}: {error}")
        return notes


def search(root: Path) -> tuple[Found | None, list[str]]:
    """The newest checkpoint under `root` that verifies, and what is wrong with those after it. No collective."""
    bad: list[str] = []
    for tag in reversed(_tags(root)):
        problem = _problem(root / tag)
        if problem is None:
            facts = _manifest(root / tag)
            # Before there was a number, it was 1.
            known = {key: facts[key] for key in ("step", "world_size", "job", "topology_digest")}
            return Found(tag, **known, format=facts.get("format", 1)), bad
        bad.append(f"{tag}: {problem}")
    return None, bad


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says of the checkpoint.

    Raises:
        OSError, ValueError: it cannot be read, or is not what was written.
    """
    facts: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if facts.get("format") == FORMAT and facts.pop("sha256") != _digest(facts):
        raise ValueError("its sha256 is not that of what it says")
    return facts


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _tags(root: Path) -> list[str]:
    """Names of complete checkpoints, oldest first; other folders are not ours."""
    names = [p.name for p in root.glob("step-*") if p.is_dir() and re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(names, key=_step)


def _step(tag: str) -> int:
    return int(tag.removeprefix("step-"))


def _problem(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None."""
    if not folder.is_dir():
        return "missing"
    try:
        files = _manifest(folder)["files"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # any text may be left of it
        return f"unreadable manifest ({error})"
    try:
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        digests = _in_threads(_sha256, [folder / name for name in files])
    except OSError as error:
        return f"unreadable ({error})"
    for (name, entry), digest in zip(files.items(), digests, strict=True):
        if digest != entry["sha256"]:
            return f"{name} does not have the sha256 of the manifest"
    return None


def _random_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank: decisions that depend on the file system are taken once."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _in_threads(function: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    """All ranks wait for it, and one thread reads and hashes one or two GB a second: hashing leaves Python's lock to others."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, paths))


def _seal(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
