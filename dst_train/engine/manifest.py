"""A checkpoint on disk: a folder of files, and a manifest that says which they are. Loading trusts nothing but one that verifies."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dst_train.files import write_text

T = TypeVar("T")
MANIFEST = "manifest.json"
FORMAT = 5  # of what is saved beside DeepSpeed's own, and of the optimiser's groups; another number after every change of them


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


def commit(root: Path, staging: str, tag: str, facts: dict[str, Any]) -> None:
    """Make a checkpoint of the folder `staging`: list its files with their sizes and sha256, sync, rename it to `tag`, and only then
    let `latest` name it. facts: what else the manifest is to say: step, world_size, job, topology_digest."""
    folder = root / staging
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    listed = dict(zip(files, _in_threads(_seal, files.values()), strict=True))
    manifest = {"format": FORMAT, **facts, "files": listed}
    write_text(folder / MANIFEST, json.dumps({**manifest, "sha256": manifest_digest(manifest)}, indent=1))
    _sync(folder)
    os.replace(folder, root / tag)
    _sync(root)  # before `latest` names it
    write_text(root / "latest", tag)
    _sync(root)


def search(root: Path) -> tuple[Found | None, list[str]]:
    """The newest checkpoint under `root` that verifies, and what is wrong with those after it. No collective."""
    bad: list[str] = []
    for tag in reversed(tags(root)):
        problem = problem_of(root / tag)
        if problem is None:
            facts = read_manifest(root / tag)
            # Before there was a number, it was 1.
            known = {key: facts[key] for key in ("step", "world_size", "job", "topology_digest")}
            return Found(tag, **known, format=facts.get("format", 1)), bad
        bad.append(f"{tag}: {problem}")
    return None, bad


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says of the checkpoint.

    Raises:
        OSError, ValueError: it cannot be read, or is not what was written.
    """
    facts: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if facts.get("format") == FORMAT and facts.pop("sha256") != manifest_digest(facts):
        raise ValueError("its sha256 is not that of what it says")
    return facts


def manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def tags(root: Path) -> list[str]:
    """Names of complete checkpoints, oldest first; other folders are not ours."""
    names = [p.name for p in root.glob("step-*") if p.is_dir() and re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(names, key=step_of)


def step_of(tag: str) -> int:
    return int(tag.removeprefix("step-"))


def problem_of(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None."""
    if not folder.is_dir():
        return "missing"
    try:
        files = read_manifest(folder)["files"]
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
