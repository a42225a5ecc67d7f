"""Sharded checkpoints that are either whole and verified, or not there.

Every rank writes its shards into a staging directory; after a barrier rank 0 writes a manifest with the size and sha256
of each file, syncs, renames the directory and only then replaces the `latest` pointer. Loading trusts nothing but a
manifest that verifies. All ranks must see the same file system.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from dst_train.engine import reshard
from dst_train.engine.manifest import FORMAT, CheckpointError, Found, commit, problem_of, search, tags

CLIENT_KEY = "dst_train"


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
        if broadcast(self._rank == 0 and problem_of(self._root / tag) is None):
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
            commit(self._root, staging, tag, {"step": step, "world_size": dist.get_world_size(), **facts})
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

    def _prune(self, newest: str) -> list[str]:
        """What is older than the newest `keep`, and later than `newest`: damaged, or the run would have continued from there."""
        notes = []
        found = tags(self._root)
        past = found[: found.index(newest) + 1]
        for name in past[: -self._keep] + found[len(past) :]:
            try:
                shutil.rmtree(self._root / name)
            except OSError as error:  # a flaky disk must not end the training
                notes.append(f"could not remove the checkpoint {name}: {error}")
        return notes


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
