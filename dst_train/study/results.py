"""result.json: what a finished run leaves, and whether it is still the run that the study means."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dst_train.files import write_text
from dst_train.job import JobError, differences
from dst_train.study.grid import Run, fingerprint

FILE = "result.json"


class Result(BaseModel):
    """seconds: of the process that finished the run, without its start; parts before a resume are not in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    evaluation: dict[str, float]
    steps: int
    seconds: float
    job_digest: str
    ranks: int
    threads: int
    git: dict[str, Any] | None
    machine: str
    torch: str

    @property
    def revision(self) -> str:
        """Of the code: 12 digits of the commit, `+changes` when files differed from it."""
        if self.git is None:
            return "unknown"
        return self.git["revision"][:12] + ("+changes" if self.git["dirty"] else "")


def write(directory: Path, result: Result) -> None:
    """Whole or not at all."""
    write_text(directory / FILE, result.model_dump_json(indent=1) + "\n")


def read_all(runs: Iterable[Run]) -> dict[str, Result]:
    """The results so far, by name of the run.

    Raises:
        JobError: a file that is no result, or results of other jobs than those of the study, each with what differs.
    """
    found: dict[str, Result] = {}
    changed = []
    for run in runs:
        path = next((folder / FILE for folder in run.directories if (folder / FILE).is_file()), None)
        if path is not None:
            result = found[run.name] = _read(path)
            if (result.job_digest, result.ranks) != (fingerprint(run.job), run.ranks):
                job = path.parent / "job.yaml"
                saved = yaml.safe_load(job.read_text(encoding="utf-8")) if job.is_file() else None
                changed.append(f"{path.parent}: is the result of {_another(run, saved, result.ranks)}")
    if changed:
        raise JobError("\n".join(changed))
    return found


def check_unfinished(runs: Iterable[Run]) -> None:
    """Runs that are not finished go on from their checkpoints, some of which a study has changed since.

    Raises:
        JobError: a checkpoint of another job than that of the study: the run would be half of one and half of the other.
    """
    changed = []
    for run in runs:
        for manifest in sorted((run.directory / "checkpoints").glob("step-*/manifest.json")):
            try:
                facts = json.loads(manifest.read_text(encoding="utf-8"))
                saved, ranks = facts["job"], facts["world_size"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: the run passes it over, and says so
            if ranks != run.ranks or _changes(run, saved):
                changed.append(f"{manifest.parent}: is a checkpoint of {_another(run, saved, ranks)}")
    if changed:
        raise JobError("\n".join(changed))


def _read(path: Path) -> Result:
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise JobError(f"{path}: is no result of a run: {error}; remove the folder to run it again") from error


def _another(run: Run, saved: dict[str, Any] | None, ranks: int) -> str:
    what = [] if ranks == run.ranks else [f"ranks: {ranks} -> {run.ranks}"]
    what += [] if saved is None else _changes(run, saved)
    return (
        f"another job than the study's ({'; '.join(what) or 'job.yaml is gone'}); remove the folder to run it again, change the study "
        "back, or give it another name"
    )


def _changes(run: Run, saved: dict[str, Any]) -> list[str]:
    return [
        str(change)
        for change in differences(saved, run.job.model_dump(mode="json"))
        if change.key not in ("name", "run_root")  # of one study under another name or at another place
    ]
