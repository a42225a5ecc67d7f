"""From a YAML file to a Job, with every error of the file at once, and back."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dst_train.job.errors import JobError, Key
from dst_train.job.schema import Job
from dst_train.job.source import Dumper, Override, Source, dotted, read
from dst_train.job.validate import validate

PATHS: tuple[Key, ...] = (("data", "train", "shards"), ("data", "eval", "shards"), ("data", "cache_dir"), ("run_root",))
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load(path: str | Path, overrides: Sequence[str | Override] = ()) -> Job:
    """Read a job. `overrides` are `dotted.key=value`, split at the first `=`, the value read as YAML.

    Raises:
        JobError: a line `file:line key.path: what is wrong` for everything that is wrong.
    """
    source = _read(path, overrides)
    if "axes" in source.data and "job" in source.data:
        raise JobError(f"{source.place(())}: this is a study: run it with dst-train study {path}")
    problems = expand_variables(source, PATHS)
    return validate(Job, source, problems, also=("extends",))


def locate(error: JobError, path: str | Path, overrides: Sequence[str | Override] = ()) -> JobError:
    """The error with the line, or the override, of the key that it is about: of a job that `load` took and something else refuses."""
    if error.key is None:
        return error
    return JobError(f"{_read(path, overrides).place(error.key)} {error}")


def _read(path: str | Path, overrides: Sequence[str | Override]) -> Source:
    return read(Path(path), [o if isinstance(o, Override) else Override(o, f"--set {o}") for o in overrides])


def dump(job: Job) -> str:
    """YAML with every default written out; `load` reads it back to an equal job."""
    return yaml.dump(job.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=120)


def digest(job: Job) -> str:
    """sha256 of the canonical form."""
    return hashlib.sha256(json.dumps(job.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def expand_variables(source: Source, keys: Sequence[Key]) -> list[str]:
    """Puts the values of environment variables in place of ${NAME} in the text at `keys`; returns what is wrong."""
    problems = []
    for key in keys:
        parent: Any = source.data
        for name in key[:-1]:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if not isinstance(parent, dict) or not isinstance(parent.get(key[-1]), str):
            continue
        text = parent[key[-1]]
        for name in sorted(set(_VARIABLE.findall(text)) - set(os.environ)):
            problems.append(
                f"{source.place(key)} {dotted(key)}: the environment variable {name} is not set (any value will do where the files are not read)"
            )
        parent[key[-1]] = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)
    return problems
