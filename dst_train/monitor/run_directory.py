"""The files of one run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from pathlib import Path
from typing import TextIO

from dst_train.monitor.environment import environment
from dst_train.topology import TopologyUpdate

# A mask of single entries has as many units as the weight has entries.
LISTED_UNITS = 16384
UNLOCKABLE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Of LayerUpdate.
TOLD = (
    "churn",
    "mean_age",
    "explored",
    "uncovered",
    "drop_margin",
    "grow_margin",
    "gates",
    "effective_units",
    "temperature",
    "moved",
)


class RunDirectory:
    """`path` holds job.yaml, ds_config.json, env.json, tensorboard/, checkpoints/, topology.jsonl, log.txt and lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.log = path / "log.txt"
        self.topology = path / "topology.jsonl"
        path.mkdir(parents=True, exist_ok=True)

    def lock(self) -> TextIO:
        """A file that keeps other trainings out of the directory until it is closed, or this process ends.

        Raises:
            BlockingIOError: another process has it; its strerror says which.
            OSError: it cannot be written, or the file system has no locks (UNLOCKABLE).
        """
        file = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            with file:
                raise BlockingIOError(error.errno, file.read().strip() or "another process") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        return file

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        partial = self.path / f"{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)

    def write_environment(self) -> None:
        self.write_text("env.json", json.dumps(environment(), indent=2))

    def append_topology(self, update: TopologyUpdate) -> None:
        """One line for each layer of an update. Units are listed for layers with at most LISTED_UNITS, else counted."""
        with self.topology.open("a", encoding="utf-8") as file:
            for layer in update.layers:
                entry = {"step": update.step, "number": update.number, "layer": layer.name, "digest": update.digest}
                for key in ("dropped", "grown", "active"):
                    units = getattr(layer, key)
                    entry[key] = units if layer.num_units <= LISTED_UNITS else len(units)
                for key in TOLD:
                    entry[key] = getattr(layer, key)
                file.write(json.dumps(entry) + "\n")

    def truncate_topology(self, after_step: int) -> None:
        """Forget updates after a step: a resumed run makes them again. A last line cut by a crash goes too."""
        if not self.topology.is_file():
            return
        kept = []
        for line in self.topology.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except ValueError:
                break
            if step <= after_step:
                kept.append(line + "\n")
        self.write_text(self.topology.name, "".join(kept))

    def active_units(self) -> dict[str, list[tuple[int, ...]]]:
        """By layer, the active units after each update so far, as far as they are listed."""
        history: dict[str, list[tuple[int, ...]]] = {}
        if self.topology.is_file():
            for line in self.topology.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if isinstance(entry["active"], list):
                    history.setdefault(entry["layer"], []).append(tuple(entry["active"]))
        return history
