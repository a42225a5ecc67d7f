"""The files of one run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dst_train.files import write_text
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

    def write_environment(self) -> None:
        write_text(self.path / "env.json", json.dumps(environment(), indent=2))

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
                if layer.gates is not None:  # all digits of all gates would be most of the file
                    entry["gates"] = [round(gate, 4) for gate in layer.gates]
                file.write(json.dumps(entry) + "\n")

    def truncate_topology(self, after_step: int) -> None:
        """Forget updates after a step: a resumed run makes them again. A last line cut by a crash goes too."""
        if self.topology.is_file():
            kept = [end for step, _, end in self._lines() if step <= after_step]
            os.truncate(self.topology, kept[-1] if kept else 0)

    def active_units(self, updates: int) -> dict[str, list[tuple[int, ...]]]:
        """By layer, the active units after each of the newest updates, as far as they are listed."""
        history: dict[str, list[tuple[int, ...]]] = {}
        if self.topology.is_file():
            first = {step: start for step, start, _ in reversed(list(self._lines()))}
            with self.topology.open("rb") as file:
                file.seek(sorted(first.values())[-updates:][0] if first else 0)
                for line in file:
                    try:
                        entry = json.loads(line)
                    except ValueError:  # damaged in its middle: pictures lack a row
                        continue
                    if isinstance(entry["active"], list):
                        history.setdefault(entry["layer"], []).append(tuple(entry["active"]))
        return history

    def _lines(self) -> Iterator[tuple[int, int, int]]:
        """Step, start and end of each whole line of topology.jsonl, which may have hundreds of MB: only the steps are read."""
        with self.topology.open("rb") as file:
            start = 0
            for line in file:
                found = re.match(rb'\{"step": (\d+), .*\}\n$', line, re.DOTALL)
                if found is None:
                    return
                yield int(found[1]), start, start + len(line)
                start += len(line)
